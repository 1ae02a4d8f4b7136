// The Python module fastdiff._C: importing it registers the kernels (bridge/); its functions tell what runs.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdlib>

#include "cpu/common.h"

namespace {

// False with a Python error set where `name` is no instruction set or this machine lacks it.
bool select_isa(const char* name) {
  for (int i = 0; i < 4; ++i) {
    if (std::strcmp(name, fastdiff::kIsaNames[i]) != 0) continue;
    if (i > fastdiff::best_isa()) {
      PyErr_Format(PyExc_ValueError, "FASTDIFF_ISA: this machine has no %s; its best is %s", name,
                   fastdiff::kIsaNames[fastdiff::best_isa()]);
      return false;
    }
    fastdiff::isa = i;
    return true;
  }
  PyErr_Format(PyExc_ValueError, "FASTDIFF_ISA: '%s' is not known; use baseline, avx2, avx512 or avx512_bf16", name);
  return false;
}

PyObject* use_isa(PyObject*, PyObject* name) {
  PyObject* bytes = PyUnicode_AsUTF8String(name);
  if (!bytes) return nullptr;
  const bool ok = select_isa(PyBytes_AsString(bytes));
  Py_DECREF(bytes);
  if (!ok) return nullptr;
  Py_RETURN_NONE;
}

PyObject* isa(PyObject*, PyObject*) { return PyUnicode_FromString(fastdiff::kIsaNames[fastdiff::isa]); }

PyObject* isas(PyObject*, PyObject*) {
  const int n = fastdiff::best_isa() + 1;
  PyObject* names = PyTuple_New(n);
  for (int i = 0; names && i < n; ++i) PyTuple_SetItem(names, i, PyUnicode_FromString(fastdiff::kIsaNames[i]));
  return names;
}

PyMethodDef methods[] = {
    {"isa", isa, METH_NOARGS, "isa() -> str: the instruction set that the CPU kernels use."},
    {"isas", isas, METH_NOARGS, "isas() -> tuple[str, ...]: those that this machine runs, slowest first."},
    {"use_isa", use_isa, METH_O,
     "use_isa(name): run the kernels of another instruction set; FASTDIFF_ISA does the same at import. For tests."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", "fastdiff's native kernels.", -1, methods, nullptr, nullptr, nullptr,
                      nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C(void) {
  const char* wanted = std::getenv("FASTDIFF_ISA");
  if (wanted && *wanted && !select_isa(wanted)) return nullptr;
  PyObject* m = PyModule_Create(&module);
  if (!m || PyModule_AddStringConstant(m, "BUILT", FASTDIFF_BUILT_WITH ", compiler " __VERSION__) < 0) return nullptr;
  return m;
}
