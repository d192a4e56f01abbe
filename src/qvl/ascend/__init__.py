"""Tools for Ascend hosts: `qvl doctor` diagnoses a host, `qvl launch` starts containers on it."""
