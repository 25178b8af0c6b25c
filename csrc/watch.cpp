// A snapshot of a tree of modules, and one pass that holds the tree against it.
//
// The pass runs before every call of an optimised model, over some 590 tensors and 300 modules
// for a 2-stack hourglass. All it does is compare pointers and counters that lie scattered in
// memory, so its cost is cache lines: it follows cached addresses, hashes nothing it need not,
// looks only where a change would matter, and prefetches.
#include "watch.h"

#include <torch/csrc/autograd/python_variable.h>

#include <tuple>
#include <utility>
#include <vector>

namespace hgfast {
namespace {

namespace py = pybind11;

// What a check found; of several findings, the first in this order (hgfast/region.py).
enum class Finding : int {
  none,
  structure,  // a module or attribute was added, removed or replaced
  hook,       // a module has a forward hook
  training,   // a module that behaves differently in training mode is in it
  gradient,   // gradients are enabled and a parameter wants one
  weights,    // a tensor was replaced or changed in place
};

constexpr size_t kAhead = 8;  // entries to prefetch: more than one memory latency of work

// A tensor's memory and contents, as far as autograd counts them. The Python object is alive,
// because the dictionary's snapshot holds it; what it stands for may be swapped.
struct TensorState {
  explicit TensorState(PyObject* tensor)
      : object(tensor),
        impl(THPVariable_Unpack(tensor).unsafeGetTensorImpl()),
        counter(*reinterpret_cast<void* const*>(&impl->version_counter())),
        storage(current_storage()),
        version(impl->is_inference() ? 0 : impl->version_counter().current_version()),
        inference(impl->is_inference()) {}

  bool is_swapped() const { return THPVariable_Unpack(object).unsafeGetTensorImpl() != impl; }
  bool unchanged() const {
    if (is_swapped()) return false;  // and impl may be gone
    // Inference tensors count no versions.
    return current_storage() == storage &&
           (inference || impl->version_counter().current_version() == version);
  }
  void prefetch() const {
    __builtin_prefetch(object);
    __builtin_prefetch(impl);
    __builtin_prefetch(counter);
  }

  PyObject* object;
  c10::TensorImpl* impl;
  const void* counter;  // where the version is, most likely: only ever prefetched
  const void* storage;
  uint32_t version;
  bool inference;

 private:
  const void* current_storage() const {
    return impl->has_storage() ? impl->unsafe_storage().unsafeGetStorageImpl() : nullptr;
  }
};

// CPython gives a dictionary a new tag at every change, so an old tag means no change: one look
// instead of a walk. From 3.14 on there is none, and the walk alone decides.
#if PY_VERSION_HEX < 0x030E0000
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
bool has_tag(PyObject* dict, uint64_t tag) {
  return reinterpret_cast<PyDictObject*>(dict)->ma_version_tag == tag;
}
uint64_t tag_of(PyObject* dict) { return reinterpret_cast<PyDictObject*>(dict)->ma_version_tag; }
#pragma GCC diagnostic pop
#else
bool has_tag(PyObject*, uint64_t) { return false; }
uint64_t tag_of(PyObject*) { return 0; }
#endif

// A dictionary of a module and the values it held.
class DictState {
 public:
  explicit DictState(const py::object& dict) : dict_(dict), tag_(tag_of(dict.ptr())) {
    Py_ssize_t position = 0;
    PyObject *key = nullptr, *value = nullptr;
    while (PyDict_Next(dict_.ptr(), &position, &key, &value)) {
      values_.push_back(py::reinterpret_borrow<py::object>(value));
    }
  }

  bool same_objects() const { return has_tag(dict_.ptr(), tag_) || walk(); }
  void prefetch() const { __builtin_prefetch(dict_.ptr()); }
  const std::vector<py::object>& values() const { return values_; }

  template <class Visit>
  void visit(const Visit& visit) const {
    visit(dict_);
    for (const py::object& value : values_) visit(value);
  }

 private:
  bool walk() const {
    const uint64_t tag = tag_of(dict_.ptr());
    Py_ssize_t position = 0;
    PyObject *key = nullptr, *value = nullptr;
    auto expected = values_.begin();
    while (PyDict_Next(dict_.ptr(), &position, &key, &value)) {
      if (expected == values_.end() || expected->ptr() != value) return false;
      ++expected;
    }
    if (expected != values_.end()) return false;
    tag_ = tag;  // changed and changed back; the GIL is held
    return true;
  }

  py::object dict_;
  std::vector<py::object> values_;
  mutable uint64_t tag_;
};

template <class State, class Holds>
bool all_of(const std::vector<State>& states, const Holds& holds) {
  for (size_t i = 0; i < states.size(); ++i) {
    if (i + kAhead < states.size()) states[i + kAhead].prefetch();
    if (!holds(states[i])) return false;
  }
  return true;
}

// A module's own attributes: a forward set on the instance would be one more.
struct Attributes {
  py::object dict;
  Py_ssize_t size;
  void prefetch() const { __builtin_prefetch(dict.ptr()); }
};

class Watch {
 public:
  // (module, whether training mode changes what it does, whether it is one of PyTorch's layers)
  using Watched = std::tuple<py::object, bool, bool>;

  explicit Watch(const std::vector<Watched>& modules)
      : training_(py::reinterpret_steal<py::object>(PyUnicode_InternFromString("training"))),
        next_id_(py::reinterpret_steal<py::object>(PyUnicode_InternFromString("next_id"))),
        handle_(py::module_::import("torch.utils.hooks").attr("RemovableHandle")) {
    const py::module_ everywhere = py::module_::import("torch.nn.modules.module");
    hooks_.push_back(everywhere.attr("_global_forward_hooks"));
    hooks_.push_back(everywhere.attr("_global_forward_pre_hooks"));
    for (const auto& [module, has_modes, is_layer] : modules) {
      py::object dict = module.attr("__dict__");
      attributes_.push_back({dict, PyDict_Size(dict.ptr())});
      if (has_modes) modes_.push_back(dict);
      hooks_.push_back(module.attr("_forward_hooks"));
      hooks_.push_back(module.attr("_forward_pre_hooks"));
      // What a layer of PyTorch's does not have, it does not ask for either.
      const auto matters = [is_layer = is_layer](const py::object& items) {
        return !is_layer || PyDict_Size(items.ptr()) > 0;
      };
      if (const py::object children = module.attr("_modules"); matters(children)) {
        structure_.emplace_back(children);
      }
      for (const char* name : {"_parameters", "_buffers"}) {
        const py::object items = module.attr(name);
        if (!matters(items)) continue;
        weights_.emplace_back(items);
        for (const py::object& value : weights_.back().values()) watch_tensor(value);
      }
    }
  }

  Finding check(bool grad_enabled) const {
    const bool same_structure =
        all_of(structure_, [](const DictState& dict) { return dict.same_objects(); }) &&
        all_of(attributes_, [](const Attributes& attributes) {
          return PyDict_Size(attributes.dict.ptr()) == attributes.size;
        });
    if (!same_structure) return Finding::structure;
    if (has_hook()) return Finding::hook;
    for (const py::object& dict : modes_) {
      if (PyDict_GetItemWithError(dict.ptr(), training_.ptr()) != Py_False) {
        return Finding::training;
      }
    }
    if (grad_enabled) {
      for (const TensorState& tensor : tensors_) {
        if (THPVariable_Unpack(tensor.object).requires_grad()) return Finding::gradient;
      }
    }
    const bool same_weights =
        all_of(weights_, [](const DictState& dict) { return dict.same_objects(); }) &&
        all_of(tensors_, [](const TensorState& tensor) { return tensor.unchanged(); });
    return same_weights ? Finding::none : Finding::weights;
  }

  // For the garbage collector: a module's attributes lead to its region, which owns this watch, and
  // a watch owns the attributes. Unseen, that circle would keep every optimised model for ever.
  template <class Visit>
  void visit(const Visit& visit) const {
    for (const DictState& state : structure_) state.visit(visit);
    for (const DictState& state : weights_) state.visit(visit);
    for (const Attributes& attributes : attributes_) visit(attributes.dict);
    for (const py::object& dict : modes_) visit(dict);
    for (const py::object& dict : hooks_) visit(dict);
  }
  void clear() {
    // Moved out first: what goes with them may come back here.
    const auto gone = std::make_tuple(std::move(structure_), std::move(weights_),
                                      std::move(attributes_), std::move(modes_), std::move(hooks_));
    structure_ = {};
    weights_ = {};
    attributes_ = {};
    modes_ = {};
    hooks_ = {};
    tensors_.clear();
    storages_.clear();
  }

 private:
  void watch_tensor(const py::object& value) {
    if (!THPVariable_Check(value.ptr())) return;
    const at::Tensor& tensor = THPVariable_Unpack(value.ptr());
    // Integers too: training moves a BatchNorm's running statistics without counting it as a
    // change, and num_batches_tracked is what tells.
    tensors_.emplace_back(value.ptr());
    // Weak: the address cannot be used again while we hold it, and the memory is not kept.
    if (tensor.has_storage()) storages_.push_back(tensor.storage().getWeakStorageImpl());
  }

  // Registering any hook anywhere takes the next id of all, so an id that has not moved on since
  // no hook was found means that there is none. One look instead of two per module.
  bool has_hook() const {
    const long id = PyLong_AsLong(
        py::reinterpret_steal<py::object>(PyObject_GetAttr(handle_.ptr(), next_id_.ptr())).ptr());
    if (id == hookless_id_) return false;
    for (const py::object& dict : hooks_) {
      if (PyDict_Size(dict.ptr()) != 0) return true;
    }
    hookless_id_ = id;  // the GIL is held
    return false;
  }

  py::object training_, next_id_, handle_;
  mutable long hookless_id_ = -1;
  std::vector<DictState> structure_;
  std::vector<Attributes> attributes_;
  std::vector<py::object> modes_, hooks_;
  std::vector<DictState> weights_;
  std::vector<TensorState> tensors_;
  std::vector<c10::weak_intrusive_ptr<c10::StorageImpl>> storages_;
};

// The watch inside a Python object; null while that is being made.
Watch* watch_of(PyObject* self) {
  auto inside = reinterpret_cast<py::detail::instance*>(self)->get_value_and_holder();
  return inside.holder_constructed() ? static_cast<Watch*>(inside.value_ptr()) : nullptr;
}

int traverse(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  int result = 0;
  if (const Watch* watch = watch_of(self))
    watch->visit([&](const py::object& owned) {
      if (result == 0 && owned) result = visit(owned.ptr(), arg);
    });
  return result;
}

int clear(PyObject* self) {
  if (Watch* watch = watch_of(self)) watch->clear();
  return 0;
}

void collect_garbage(PyHeapTypeObject* heap_type) {
  PyTypeObject& type = heap_type->ht_type;
  type.tp_flags |= Py_TPFLAGS_HAVE_GC;
  type.tp_traverse = traverse;
  type.tp_clear = clear;
}

}  // namespace

void bind_watch(py::module_& m) {
  py::class_<Watch>(m, "Watch",
                    "A snapshot of modules: Watch([(module, training mode changes what it does, it "
                    "is one of PyTorch's own layers)]).",
                    py::custom_type_setup(collect_garbage))
      .def(py::init<const std::vector<Watch::Watched>&>(), py::arg("modules"))
      .def(
          "check",
          [](const Watch& watch, bool grad_enabled) {
            return static_cast<int>(watch.check(grad_enabled));
          },
          py::arg("grad_enabled"),
          "Hold the modules against the snapshot. Returns the number of the first of: none, "
          "structure, hook, training, gradient, weights.");
}

}  // namespace hgfast
