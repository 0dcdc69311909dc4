# What tests/testbed/inside/plugged_boots.py measures, with its arguments; docs/gpus.md has what was seen:
# make testbed-run DEVICES=gpu-host SCRIPT=tests/testbed/plugged_boots.sh ARGS="--rounds 3"
cd /root/casemate && exec /opt/casemate/bin/python3 -B -m tests.testbed.inside.plugged_boots "$@"
