"""From the plain values of a mapping to dataclasses: what is legal, and errors that name key and legal values."""
