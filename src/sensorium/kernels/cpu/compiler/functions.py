"""Functions within kernels: they are compiled with a kernel, and never alone.

Numba takes each of them through the whole of LLVM, to machine code that could be called from
Python, and then once more as part of every function and kernel that calls it. Only kernels are
called here. Without these steps kernels compile in about half the time.
"""

from __future__ import annotations

from typing import Any

from numba.core import codegen as numba_codegen
from numba.core import compiler as numba_compiler
from numba.core import compiler_machinery, untyped_passes

# Numba has no types.
codegen: Any = numba_codegen
compiler: Any = numba_compiler
machinery: Any = compiler_machinery


class _Codegen:
    """Numba's generator of code for what has no machine code: no address of its environment."""

    def __init__(self, whole: Any) -> None:
        self._whole = whole

    def __getattr__(self, name: str) -> Any:
        return getattr(self._whole, name)

    def set_env(self, name: str, environment: Any) -> None:
        """Do nothing: a function without Python objects does not look at its environment."""


class FunctionLibrary(codegen.JITCodeLibrary):
    """LLVM's code of a function, for kernels to link; they optimize and translate it."""

    @property
    def codegen(self) -> Any:
        """The generator that Numba tells the address of a function's environment."""
        return _Codegen(self._codegen)

    def get_pointer_to_function(self, name: str) -> int:
        """Return 0, Numba's word for a function that has no machine code."""
        return 0

    def _optimize_final_module(self) -> None:
        pass

    def _finalize_final_module(self) -> None:
        self._finalized = True


@machinery.register_pass(mutates_CFG=False, analysis_only=True)
class _UseFunctionLibrary(machinery.AnalysisPass):
    """Pass of the compiler that chooses the library into which a function is lowered."""

    _name = "sensorium_function_library"

    def __init__(self) -> None:
        machinery.AnalysisPass.__init__(self)

    def run_pass(self, state: Any) -> bool:
        state.library = FunctionLibrary(state.targetctx.codegen(), state.func_id.func_qualname)
        return False


class FunctionCompiler(compiler.CompilerBase):
    """Numba's compiler, for functions within kernels."""

    def define_pipelines(self) -> list[Any]:
        """Return the one sequence of passes: that for code without Python objects."""
        passes = compiler.DefaultPassBuilder.define_nopython_pipeline(self.state)
        passes.add_pass_after(_UseFunctionLibrary, untyped_passes.IRProcessing)
        passes.finalize()
        return [passes]


OPTIONS = {
    "pipeline_class": FunctionCompiler,
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
}
"""Options of ``numba.njit`` for such functions."""
