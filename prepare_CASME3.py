import sys

print("error: prepare_CASME3.py is now: python prepare.py casme3 (the same flags)", file=sys.stderr)
sys.exit(2)
