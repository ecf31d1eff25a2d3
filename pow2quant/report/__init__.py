"""What people read: a run's report as a web page."""
