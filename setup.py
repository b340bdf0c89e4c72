"""The build's programmable half.

Names, dependencies and package data are static, in pyproject.toml. This file is where the native
extension will be built from; until there is one, there is nothing to add.
"""

from setuptools import setup

setup()
