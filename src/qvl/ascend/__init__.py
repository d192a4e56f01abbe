"""Living on Ascend hosts: `qvl doctor` finds what is wrong with one, `qvl launch` starts containers on it."""
