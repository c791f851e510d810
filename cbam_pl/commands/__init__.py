"""One file or folder for each command of train.py."""
