"""The operations, one file each: the public function with its checks; schema, fake and autograd; the backends.

`bacon_fast.functional` names the public ones. Importing this package imports every file of it, so that
`backends.BACKENDS` is complete, and then loads the native code of all of them.
"""

from importlib import import_module
from pkgutil import iter_modules

from . import backends

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
backends.load_native()
