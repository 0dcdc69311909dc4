# What tests/testbed/inside/kill_cycles.py does, with its arguments; docs/gpus.md has what was seen:
# python -m tests.testbed run --devices gpu-host --limit-s 5400 tests/testbed/kill_cycles.sh --cycles 100
cd /root/casemate && exec /opt/casemate/bin/python3 -B -m tests.testbed.inside.kill_cycles "$@"
