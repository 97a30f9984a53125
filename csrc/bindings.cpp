// The only file that includes pybind11: params structs as keyword constructors, kernels as functions on them.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <map>
#include <string>
#include <type_traits>

#include "kernels.h"
#include "types.h"

namespace py = pybind11;

namespace {

// Writes one Python value into a field: pointers come as integers (0 or None: null), enums as integers,
// fixed arrays as sequences.
template <class T>
void store(T& field, py::handle value) {
  if constexpr (std::is_pointer_v<T>) {
    field = value.is_none() ? nullptr : reinterpret_cast<T>(value.cast<std::uintptr_t>());
  } else if constexpr (std::is_enum_v<T>) {
    field = static_cast<T>(value.cast<std::underlying_type_t<T>>());
  } else if constexpr (std::is_array_v<T>) {
    py::sequence values = py::reinterpret_borrow<py::sequence>(value);
    if (py::len(values) != std::extent_v<T>) throw py::value_error("an array field got the wrong number of values");
    for (std::size_t i = 0; i < std::extent_v<T>; ++i) store(field[i], values[i]);
  } else {
    field = value.cast<T>();
  }
}

template <class P>
using Setters = std::map<std::string, void (*)(P&, py::handle)>;

// Module.NAME(field=value, ...): a params struct; fields left out are zero or their default.
template <class P>
void bind_params(py::module_& module, const char* name, const Setters<P>& setters) {
  py::class_<P>(module, name).def(py::init([setters, name](const py::kwargs& fields) {
    P params{};
    for (std::pair<py::handle, py::handle> field : fields) {
      const std::string key = py::str(field.first);
      const auto found = setters.find(key);
      if (found == setters.end()) throw py::type_error(std::string(name) + " has no field '" + key + "'");
      found->second(params, field.second);
    }
    return params;
  }));
}

// TK_FIELDS(Params, a, b, …): the setters of the named fields.
#define TK_FIELD(P, field) {#field, [](P& params, py::handle value) { store(params.field, value); }}
#define TK_PARENS ()
#define TK_EXPAND(...) TK_EXPAND3(TK_EXPAND3(TK_EXPAND3(TK_EXPAND3(__VA_ARGS__))))
#define TK_EXPAND3(...) TK_EXPAND2(TK_EXPAND2(TK_EXPAND2(TK_EXPAND2(__VA_ARGS__))))
#define TK_EXPAND2(...) TK_EXPAND1(TK_EXPAND1(TK_EXPAND1(TK_EXPAND1(__VA_ARGS__))))
#define TK_EXPAND1(...) __VA_ARGS__
#define TK_EACH(P, field, ...) TK_FIELD(P, field) __VA_OPT__(, TK_EACH_AGAIN TK_PARENS(P, __VA_ARGS__))
#define TK_EACH_AGAIN() TK_EACH
#define TK_FIELDS(P, ...) Setters<P>{TK_EXPAND(TK_EACH(P, __VA_ARGS__))}

// module.NAME(params) runs kernels().NAME with the GIL released.
#define TK_BIND_KERNEL(module, name, P) \
  module.def(#name, [](const P& params) { tk::kernels().name(params); }, py::call_guard<py::gil_scoped_release>())

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "thinkernel's C++ and CUDA kernels; called by thinkernel.ops alone.";
  m.def("isa", [] { return tk::kernels().level; }, "The ISA level in use.");
  m.def("isa_levels", [] {
    py::list names;
    for (const char* const* name = tk::isa_levels(); *name != nullptr; ++name) names.append(*name);
    return names;
  }, "The ISA levels this CPU runs and this build has, lowest first.");
  m.def("set_isa", [](const std::string& level) { tk::set_isa(level.c_str()); }, "Chooses a level; for tests.");
  m.attr("cuda_left_out") = TK_CUDA_WHY;  // "" when the CUDA half is in
}
