"""AIMET 2.42's documented flows, written anew as scripts that know nothing of us.

`tests/drop_in/test_flows.py` runs each of them as it stands, and with nothing but its import lines changed to ours. A
script is given `folder`, a place for its files.
"""
