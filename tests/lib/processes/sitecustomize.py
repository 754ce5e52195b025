"""Python runs this when it starts: processes that hasty tests start are hasty. Nothing is imported before they do."""

import importlib.util
import sys
from pathlib import Path


class Finder:
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name != "mest_compile.kernels.cache":
            return None
        sys.meta_path.remove(cls)
        spec = importlib.util.find_spec(name)
        usual = spec.loader.exec_module

        def exec_module(module):
            usual(module)
            sys.path.append(str(Path(__file__).parents[1]))
            import hasty

            module.Builder._new_library = hasty.hastily(module.Builder._new_library)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Finder)
