# What tests/testbed/inside/other_ways.py measures: make testbed-run SCRIPT=tests/testbed/other_ways.sh
cd /root/casemate && exec /opt/casemate/bin/python3 -B -m tests.testbed.inside.other_ways
