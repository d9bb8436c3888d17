"""The *branch* kind: a few transformer blocks on the final embedding (arXiv 2504.07513)."""

from embedcache.carryon.branch.config import BranchConfig
from embedcache.carryon.registry import Kind, register

register(Kind(BranchConfig, "embedcache.carryon.branch.model:Branch"))
