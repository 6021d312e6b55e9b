import sys

print("error: render_CASME3.py is now: python render.py casme3 (the same flags)", file=sys.stderr)
sys.exit(2)
