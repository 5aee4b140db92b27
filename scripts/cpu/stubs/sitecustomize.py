# SPDX-License-Identifier: MIT
"""Lets SGLang import on a machine without a GPU.

SGLang imports triton, torchvision and datasets at module level, also when it serves text from the
CPU and never calls them. triton is 1 GB, and torchvision's wheel on PyPI does not load beside a CPU
torch; so each of them that is *not installed* becomes an inert package. A real install always wins:
the finder is the last one asked.
"""

import importlib.abc
import importlib.machinery
import sys
import types

ABSENT = frozenset({"triton", "torchvision", "datasets"})


class _AnyAttribute(type):
    """Classes whose attributes are strings, for the likes of InterpolationMode.BICUBIC."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return f"{cls.__name__}.{name}"


class _Inert(metaclass=_AnyAttribute):
    """Stands for a class: it may be subclassed and constructed, and does nothing."""

    def __init__(self, *args, **kwargs):
        pass

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__()


class _Module(types.ModuleType):
    """Stands for a module or a function; as a decorator it returns what it decorates."""

    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        path = f"{self.__name__}.{name}"
        if name[0].isupper():
            value = types.new_class(name, (_Inert,), {}, lambda body: body.update(__module__=path))
        else:
            value = importlib.import_module(path)
        setattr(self, name, value)
        return value

    def __call__(self, *args, **kwargs):
        bare_decorator = len(args) == 1 and callable(args[0]) and not kwargs
        return args[0] if bare_decorator else lambda function: function

    def __bool__(self):
        return False

    def __iter__(self):
        return iter(())


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    owner = "pat-sglang"

    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] not in ABSENT:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, origin=__file__, is_package=True)

    def create_module(self, spec):
        return _Module(spec.name)

    def exec_module(self, module):
        if module.__name__ == "triton":
            module.__version__ = "3.0.0"  # compared with minimum versions
            module.cdiv = lambda a, b: -(-a // b)  # called by host code, not only by kernels
            module.next_power_of_2 = lambda n: 1 << max(n - 1, 0).bit_length()
        elif module.__name__ == "torchvision":
            module.__version__ = "0.0.0"


if not any(getattr(finder, "owner", None) == _Finder.owner for finder in sys.meta_path):
    sys.meta_path.append(_Finder())
