"""The description for package indexes, whose pages have none of the README's files beside them.

Everything else is in ``setup.cfg``.
"""

import re
from pathlib import Path

from setuptools import setup


def for_an_index(readme: str) -> str:
    """Leave out pictures in files, and name the files that links lead to: ``text (`file`)``."""
    readme = re.sub(r"!\[[^]]*\]\((?!https?:)[^)]*\)\s*", "", readme)
    return re.sub(
        r"\[([^]]+)\]\((?!https?:)([^)#]+)[^)]*\)",
        lambda link: f"`{link[2]}`" if link[1] == link[2] else f"{link[1]} (`{link[2]}`)",
        readme,
    )


if __name__ == "__main__":
    readme = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    setup(long_description=for_an_index(readme))
