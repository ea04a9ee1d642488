"""One run of train.py."""
