"""Run every benchmark of the suite once, by airspeed velocity's runner; print JSON of the results.

Of each parameter one value alone is left, so that few kernels are compiled. Functions may be named
that numbabn then lacks.
"""

import contextlib
import importlib
import json
import sys

from asv_runner._aux import update_sys_path
from asv_runner.discovery import disc_benchmarks, disc_modules, get_benchmark_from_name

ONCE = {"number": 1, "repeat": 1, "rounds": 1, "warmup_time": 0}


def one_of_each(params):
    return tuple([p for p in each if p == "inference"] or each[:1] for each in params)


def result(root, name, caches):
    benchmark = get_benchmark_from_name(root, f"{name}-0", extra_params=ONCE)
    key = benchmark.setup_cache_key
    if key is not None and key not in caches:
        caches[key] = benchmark.do_setup_cache()
    benchmark.set_cache(caches.get(key))
    return None if benchmark.do_setup() else benchmark.do_run()


def main(root, *lacking):
    update_sys_path(root)
    importlib.import_module("suite")  # first, as it says where numba keeps kernels
    for name in lacking:
        delattr(importlib.import_module("numbabn"), name)
    with contextlib.redirect_stdout(sys.stderr):
        names = [benchmark.name for benchmark in disc_benchmarks(root)]
        for module in disc_modules("suite"):
            for kind in vars(module).values():
                if isinstance(kind, type) and "params" in vars(kind):
                    kind.params = one_of_each(kind.params)
        caches = {}
        found = {name: result(root, name, caches) for name in names}
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
