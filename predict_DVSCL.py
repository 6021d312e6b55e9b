import sys

print("error: predict_DVSCL.py is now: python predict.py (the same flags)", file=sys.stderr)
sys.exit(2)
