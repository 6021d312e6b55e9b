import sys

print("error: sweep_intensity.py is now: python benchmarks/sweep_intensity.py", file=sys.stderr)
sys.exit(2)
