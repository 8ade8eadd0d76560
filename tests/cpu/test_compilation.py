"""How kernels compile: what they are made of becomes machine code with them, not by itself."""

import numba
import pytest

from numbabn.cpu import compilation


@pytest.mark.parametrize("decorate", [compilation.primitive, compilation.inlined])
def test_parts_become_machine_code_with_what_calls_them_alone(decorate):
    @decorate
    def double(x):
        return 2 * x

    @numba.njit
    def whole(x):
        return double(x) + 1

    assert whole(1.5) == 4
    (part,) = double.overloads.values()
    engine = part.library._codegen._engine
    names = [function.name for function in part.library.get_defined_functions()]
    assert names
    assert not any(engine.is_symbol_defined(name) for name in names)
