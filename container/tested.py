"""Prints job/machine/tested.py: the versions in a constraints file of what pyproject.toml names for a job. Part of `make lock`.

python container/tested.py container/constraints.txt > job/machine/tested.py
"""

import re
import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
needed = [*project["dependencies"], *project["optional-dependencies"]["job"]]
names = {re.split(r"[^\w.-]", requirement)[0].lower() for requirement in needed}
lines = Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()
versions = dict(line.lower().split("==") for line in lines if "==" in line)
print('"""The versions that this project was tested with. Written by `make lock`, from container/constraints.txt."""')
print("\nTESTED = {")
for name in sorted(names):
    print(f'    "{name}": "{versions[name]}",')
print("}")
