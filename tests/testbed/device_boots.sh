# What tests/testbed/inside/device_boots.py measures, with its arguments; docs/gpus.md has the table:
# make testbed-run DEVICES=gpu-host SCRIPT=tests/testbed/device_boots.sh ARGS="--rounds 3"
cd /root/casemate && exec /opt/casemate/bin/python3 -B -m tests.testbed.inside.device_boots "$@"
