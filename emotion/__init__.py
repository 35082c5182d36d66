"""The science: functions from arrays and files to arrays and files. No code for clusters, signals or object storage."""
