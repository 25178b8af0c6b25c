// A snapshot of a tree of modules, and one pass that holds the tree against it.
//
// The pass runs before every call of an optimised model, over some 600 tensors and 300 modules
// for a 2-stack hourglass, so it follows cached pointers: dictionaries are walked in place
// (PyDict_Next hashes nothing) and compared by identity. In Python the same takes 100 us.
#include "watch.h"

#include <torch/csrc/autograd/python_variable.h>

#include <optional>
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

// A tensor's identity and contents, as far as autograd counts them.
class TensorState {
 public:
  explicit TensorState(PyObject* object) : impl_(THPVariable_Unpack(object).unsafeGetTensorImpl()) {
    if (impl_->has_storage()) {
      // Weak: the address cannot be used again while we hold it, and the memory is not kept.
      weak_storage_ = impl_->unsafe_storage().getWeakStorageImpl();
    }
    storage_ = storage();
    offset_ = impl_->storage_offset();
    version_ = version();
  }

  bool unchanged() const {
    return storage() == storage_ && impl_->storage_offset() == offset_ && version() == version_;
  }
  bool requires_grad() const { return impl_->requires_grad(); }

 private:
  const void* storage() const {
    return impl_->has_storage() ? impl_->unsafe_storage().unsafeGetStorageImpl() : nullptr;
  }
  uint32_t version() const {  // inference tensors have none
    return impl_->is_inference() ? 0 : impl_->version_counter().current_version();
  }

  c10::TensorImpl* impl_;  // alive: the owner holds the Python object
  std::optional<c10::weak_intrusive_ptr<c10::StorageImpl>> weak_storage_;
  const void* storage_;
  ptrdiff_t offset_;
  uint32_t version_;
};

// A dictionary of a module and the values it held.
class DictState {
 public:
  explicit DictState(py::object dict) : dict_(std::move(dict)) {
    Py_ssize_t position = 0;
    PyObject *key = nullptr, *value = nullptr;
    while (PyDict_Next(dict_.ptr(), &position, &key, &value)) {
      values_.push_back(py::reinterpret_borrow<py::object>(value));
      if (THPVariable_Check(value)) tensors_.emplace_back(value);
    }
  }

  bool same_objects() const {
    Py_ssize_t position = 0;
    PyObject *key = nullptr, *value = nullptr;
    auto expected = values_.begin();
    while (PyDict_Next(dict_.ptr(), &position, &key, &value)) {
      if (expected == values_.end() || expected->ptr() != value) return false;
      ++expected;
    }
    return expected == values_.end();
  }

  const std::vector<TensorState>& tensors() const { return tensors_; }

 private:
  py::object dict_;
  std::vector<py::object> values_;
  std::vector<TensorState> tensors_;
};

// One module: what it is made of, and what may have been hung on it.
class ModuleState {
 public:
  ModuleState(const py::object& module, bool has_modes)
      : attributes_(module.attr("__dict__")),
        size_(PyDict_Size(attributes_.ptr())),
        has_modes_(has_modes),
        hooks_(module.attr("_forward_hooks")),
        pre_hooks_(module.attr("_forward_pre_hooks")),
        modules_(module.attr("_modules")),
        parameters_(module.attr("_parameters")),
        buffers_(module.attr("_buffers")) {}

  bool same_structure() const {
    // A forward set on the instance, a parametrisation: both add an attribute.
    return PyDict_Size(attributes_.ptr()) == size_ && modules_.same_objects();
  }
  bool has_hook() const {
    return PyDict_Size(hooks_.ptr()) != 0 || PyDict_Size(pre_hooks_.ptr()) != 0;
  }
  bool in_training(PyObject* key) const {
    return has_modes_ && PyDict_GetItemWithError(attributes_.ptr(), key) != Py_False;
  }
  bool wants_gradient() const {
    for (const TensorState& tensor : parameters_.tensors()) {
      if (tensor.requires_grad()) return true;
    }
    return false;
  }
  bool same_weights() const { return same(parameters_) && same(buffers_); }

 private:
  static bool same(const DictState& dict) {
    if (!dict.same_objects()) return false;
    for (const TensorState& tensor : dict.tensors()) {
      if (!tensor.unchanged()) return false;
    }
    return true;
  }

  py::object attributes_;
  Py_ssize_t size_;
  bool has_modes_;
  py::object hooks_, pre_hooks_;
  DictState modules_, parameters_, buffers_;
};

class Watch {
 public:
  explicit Watch(const std::vector<std::pair<py::object, bool>>& modules)
      : training_(py::reinterpret_steal<py::object>(PyUnicode_InternFromString("training"))) {
    modules_.reserve(modules.size());
    for (const auto& [module, has_modes] : modules) modules_.emplace_back(module, has_modes);
  }

  Finding check(bool grad_enabled) const {
    bool hook = false, training = false, gradient = false, weights = false;
    for (const ModuleState& module : modules_) {
      if (!module.same_structure()) return Finding::structure;
      hook = hook || module.has_hook();
      training = training || module.in_training(training_.ptr());
      gradient = gradient || (grad_enabled && module.wants_gradient());
      weights = weights || !module.same_weights();
    }
    if (hook) return Finding::hook;
    if (training) return Finding::training;
    if (gradient) return Finding::gradient;
    return weights ? Finding::weights : Finding::none;
  }

 private:
  py::object training_;
  std::vector<ModuleState> modules_;
};

}  // namespace

void bind_watch(py::module_& m) {
  py::class_<Watch>(m, "Watch",
                    "A snapshot of modules: Watch([(module, behaves differently in training)]).")
      .def(py::init<const std::vector<std::pair<py::object, bool>>&>(), py::arg("modules"))
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
