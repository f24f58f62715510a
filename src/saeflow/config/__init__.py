"""The configuration as data: one frozen dataclass a group of `conf/`, validated when it is built."""

from saeflow.config.point import *  # noqa: F403
