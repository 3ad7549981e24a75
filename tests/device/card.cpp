// A stand-in for a CUDA device: "cuda:N" whose memory is the host's and whose kernels are the CPU's.
//
// A CPU build of PyTorch leaves the dispatch key CUDA empty. This file registers a boxed fallback there, which shows each
// operation's tensors to the CPU's kernel as views of the same memory. It counts kernel launches, waits for the device and
// bytes moved, keeps the peak of the memory, refuses to allocate beyond a limit, and fails on request as a lost card does.
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

#include <array>
#include <atomic>
#include <cstring>
#include <string>
#include <unordered_set>
#include <vector>

namespace {

using c10::DeviceIndex;
using c10::IValue;
constexpr int kCards = 8;
const c10::DispatchKeySet kKeys(c10::DispatchKey::CUDA);

std::atomic<int> cards{1};
std::atomic<int64_t> launches{0}, waits{0}, to_card{0}, from_card{0}, fails_after{-1};
std::string failure;
thread_local DeviceIndex current = 0;

struct Memory {
  std::atomic<int64_t> held{0}, peak{0}, limit{0};
};
std::array<Memory, kCards> memory;

void launch() {
  launches++;
  if (fails_after >= 0 && fails_after-- == 0) {
    fails_after = 0;  // a poisoned context fails from now on
    TORCH_CHECK_WITH(Error, false, failure);
  }
}

struct On {  // makes a card the current one, for a scope
  DeviceIndex before = current;
  explicit On(std::optional<at::Device> device) {
    const DeviceIndex wanted = device && device->has_index() ? device->index() : current;
    TORCH_CHECK(wanted < cards, "CUDA error: invalid device ordinal");
    current = wanted;
  }
  ~On() { current = before; }
};

// ---------------------------------------------------------------------------------------------------------- memory

struct Block {
  void* data;
  int64_t bytes;
  DeviceIndex card;
};

void give_back(void* pointer) {
  auto* block = static_cast<Block*>(pointer);
  memory[block->card].held -= block->bytes;
  c10::free_cpu(block->data);
  delete block;
}

struct CardAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t asked) override {
    const c10::Device device(c10::DeviceType::CUDA, current);
    if (asked == 0) return {nullptr, nullptr, &c10::detail::deleteNothing, device};
    auto& of = memory[current];
    const auto bytes = int64_t((asked + 511) / 512 * 512);  // as CUDA's caching allocator rounds small blocks
    TORCH_CHECK_WITH(
        OutOfMemoryError, of.limit == 0 || of.held + bytes <= of.limit, "CUDA out of memory. Tried to allocate ", bytes,
        " bytes. GPU ", int(current), " has a total capacity of ", of.limit.load(), " bytes of which ",
        of.limit - of.held, " bytes is free.");
    const int64_t held = of.held += bytes;
    for (int64_t seen = of.peak; seen < held && !of.peak.compare_exchange_weak(seen, held);) {
    }
    auto* block = new Block{c10::alloc_cpu(asked), bytes, current};
    return {block->data, block, &give_back, device};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

CardAllocator* allocator() {
  static auto* one = new CardAllocator();
  return one;
}

// ---------------------------------------------------------------------------------------------------- guard and hooks

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
  c10::Device getDevice() const override { return {c10::DeviceType::CUDA, current}; }
  c10::Device exchangeDevice(c10::Device to) const override {
    const auto before = getDevice();
    uncheckedSetDevice(to);
    return before;
  }
  void setDevice(c10::Device to) const override { uncheckedSetDevice(to); }
  void uncheckedSetDevice(c10::Device to) const noexcept override {
    if (to.has_index()) current = to.index();
  }
  DeviceIndex deviceCount() const noexcept override { return DeviceIndex(cards.load()); }
  c10::Stream getStream(c10::Device of) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, of); }
  c10::Stream getDefaultStream(c10::Device of) const override { return c10::Stream(c10::Stream::DEFAULT, of); }
  c10::Stream getNewStream(c10::Device of, int) const override { return c10::Stream(c10::Stream::DEFAULT, of); }
  c10::Stream exchangeStream(c10::Stream to) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, to.device()); }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override { waits++; }
  void synchronizeDevice(DeviceIndex) const override { waits++; }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard);

struct Hooks : public at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return DeviceIndex(cards.load()); }
  int getNumGPUs() const override { return cards; }
  DeviceIndex current_device() const override { return current; }
  DeviceIndex getCurrentDevice() const override { return current; }
  void setCurrentDevice(DeviceIndex to) const override { current = to; }
  void deviceSynchronize(DeviceIndex) const override { waits++; }
  at::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
};

}  // namespace
namespace at {
using CardHooks = ::Hooks;
REGISTER_CUDA_HOOKS(CardHooks);
}  // namespace at
namespace {

// ------------------------------------------------------------------------------------- tensors, seen from both sides

bool on_card(const at::Tensor& t) { return t.defined() && t.device().is_cuda(); }

at::Tensor seen_by_cpu(const at::Tensor& t) {
  if (!on_card(t)) return t;
  const auto options = at::TensorOptions().dtype(t.dtype());
  if (t.numel() == 0) return at::empty_strided(t.sizes(), t.strides(), options);
  const auto keep = t.storage();
  auto view = at::from_blob(const_cast<void*>(t.const_data_ptr()), t.sizes(), t.strides(), [keep](void*) {}, options);
  return t.is_conj() ? view.conj() : view;
}

at::Tensor moved_to_card(const at::Tensor& t, DeviceIndex card) {
  On on(at::Device(at::kCUDA, card));
  const size_t bytes = t.storage().nbytes();
  auto data = allocator()->allocate(bytes);
  if (bytes) std::memcpy(data.get(), t.storage().data(), bytes);
  c10::Storage storage(c10::Storage::use_byte_size_t(), bytes, std::move(data), allocator(), /*resizable=*/true);
  auto impl = c10::make_intrusive<c10::TensorImpl>(std::move(storage), kKeys, t.dtype());
  impl->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
  return at::Tensor(std::move(impl));
}

void take_over(const at::Tensor& tensor, const at::Tensor& of) {
  auto* impl = tensor.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(of.storage());
  impl->set_sizes_and_strides(of.sizes(), of.strides(), of.storage_offset());
}

at::Tensor view_of(const at::Tensor& base, c10::IntArrayRef sizes, c10::IntArrayRef strides, int64_t offset, caffe2::TypeMeta type) {
  // The base's keys: in inference mode they differ from a new tensor's.
  auto impl = c10::make_intrusive<c10::TensorImpl>(
      c10::TensorImpl::VIEW, c10::Storage(base.storage()), base.key_set(), type);
  impl->set_sizes_and_strides(sizes, strides, offset);
  return at::Tensor(std::move(impl));
}

bool inside(const at::Tensor& out, const at::Tensor& given) {
  if (!on_card(given) || given.numel() == 0 || out.numel() == 0) return false;
  const auto* begin = static_cast<const char*>(given.storage().data());
  const auto* at = static_cast<const char*>(out.const_data_ptr());
  return at >= begin && at < begin + given.storage().nbytes();
}

// --------------------------------------------------------------------------------------------------- all operations

bool waits_for_values(const std::string& name) {
  // A shape or a Python number of the result depends on values: a real device is waited for.
  static const std::unordered_set<std::string> names{
      "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive",
      "aten::equal", "aten::repeat_interleave", "aten::is_nonzero", "aten::bincount", "aten::linalg_cholesky",
      "aten::linalg_inv", "aten::_linalg_eigh", "aten::_linalg_svd", "aten::quantile", "aten::nanquantile"};
  return names.count(name) > 0;
}

template <class F>
void each_tensor(IValue& value, F&& replaced) {
  if (value.isTensor()) {
    if (value.toTensor().defined()) value = replaced(value.toTensor());
  } else if (value.isTensorList()) {
    auto list = value.toTensorVector();
    for (auto& t : list) t = replaced(t);
    value = c10::List<at::Tensor>(list);
  } else if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> list;
    for (const std::optional<at::Tensor>& t : value.toOptionalTensorVector())
      list.push_back(t && t->defined() ? std::optional<at::Tensor>(replaced(*t)) : t);
    value = list;
  }
}

void any_operation(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const std::string& name = schema.name();
  const bool indexing = name.find("index") != std::string::npos;
  const size_t begin = stack->size() - schema.arguments().size();
  std::vector<std::pair<at::Tensor, at::Tensor>> pairs;  // as given, and as the CPU's kernel sees it
  DeviceIndex card = -1;
  std::optional<at::Device> target;
  bool by_mask = false;
  std::string stranger;
  for (size_t i = begin; i < stack->size(); i++) {
    auto& value = (*stack)[i];
    const bool index = indexing && schema.arguments()[i - begin].name() == "indices";
    if (value.isGenerator()) {
      TORCH_CHECK(value.toGenerator().device().is_cuda(), "Expected a 'cuda' device type for generator but found 'cpu'");
      value = IValue();
      continue;
    }
    if (value.isDevice()) {
      target = value.toDevice();
      value = c10::Device(c10::DeviceType::CPU);
      continue;
    }
    each_tensor(value, [&](const at::Tensor& t) -> at::Tensor {
      if (index && (t.scalar_type() == at::kBool || t.scalar_type() == at::kByte || t.device().is_cpu())) by_mask = true;
      if (!on_card(t)) {
        if (t.dim() > 0 && !index) stranger = c10::str("cpu, of shape ", t.sizes());
        return t;
      }
      if (card >= 0 && card != t.device().index()) stranger = c10::str("cuda:", int(t.device().index()));
      if (card < 0) card = t.device().index();
      pairs.emplace_back(t, seen_by_cpu(t));
      return pairs.back().second;
    });
  }
  TORCH_CHECK(
      card < 0 || stranger.empty(), "Expected all tensors to be on the same device, but found at least two devices, cuda:",
      int(card), " and ", stranger, "! (", name, ")");
  if (card < 0) card = target && target->has_index() ? target->index() : current;
  if (by_mask || waits_for_values(name)) waits++;
  op.callBoxed(stack);
  const size_t results = schema.returns().size();
  bool computed = results == 0;
  for (size_t i = stack->size() - results; i < stack->size(); i++) {
    each_tensor((*stack)[i], [&](const at::Tensor& out) -> at::Tensor {
      for (const auto& [given, seen] : pairs) {
        if (!out.is_same(seen)) continue;
        computed = true;  // in place, or into an out= argument that may have been resized
        if (given.sizes() != seen.sizes() || given.numel() == 0 || !inside(seen, given))
          take_over(given, moved_to_card(seen, card));
        return given;
      }
      for (const auto& [given, seen] : pairs) {
        if (!inside(out, given)) continue;
        const auto distance =
            static_cast<const char*>(out.const_data_ptr()) - static_cast<const char*>(given.storage().data());
        return view_of(given, out.sizes(), out.strides(), distance / int64_t(out.itemsize()), out.dtype());
      }
      computed = true;
      return moved_to_card(out, card);
    });
  }
  if (computed) launch();
}

// ------------------------------------------------------------------------------------- operations with their own code

at::Tensor empty(
    c10::IntArrayRef sizes, std::optional<at::ScalarType> type, std::optional<at::Layout>, std::optional<at::Device> device,
    std::optional<bool>, std::optional<at::MemoryFormat> format) {
  On on(device);
  return at::detail::empty_generic(sizes, allocator(), kKeys, c10::dtype_or_default(type), format);
}

at::Tensor empty_strided(
    c10::IntArrayRef sizes, c10::IntArrayRef strides, std::optional<at::ScalarType> type, std::optional<at::Layout>,
    std::optional<at::Device> device, std::optional<bool>) {
  On on(device);
  return at::detail::empty_strided_generic(sizes, strides, allocator(), kKeys, c10::dtype_or_default(type));
}

at::Tensor& copy(at::Tensor& to, const at::Tensor& from, bool non_blocking) {
  if (to.is_meta() || from.is_meta()) return to;
  const auto bytes = int64_t(from.numel()) * int64_t(from.itemsize());
  if (on_card(to) && on_card(from)) {
    launch();
  } else if (on_card(to)) {
    to_card += bytes;
    waits += !non_blocking;
  } else {
    from_card += bytes;
    waits++;
  }
  seen_by_cpu(to).copy_(seen_by_cpu(from));
  return to;
}

at::Scalar item(const at::Tensor& t) {
  waits++;
  return at::_local_scalar_dense(seen_by_cpu(t));
}

at::Tensor as_strided(const at::Tensor& t, c10::IntArrayRef sizes, c10::IntArrayRef strides, std::optional<int64_t> offset) {
  return view_of(t, sizes, strides, offset.value_or(t.storage_offset()), t.dtype());
}

const at::Tensor& resize(const at::Tensor& t, c10::IntArrayRef sizes, std::optional<at::MemoryFormat>) {
  const auto fresh = empty(sizes, t.scalar_type(), std::nullopt, t.device(), std::nullopt, std::nullopt);
  if (fresh.numel() <= t.numel()) {
    t.unsafeGetTensorImpl()->set_sizes_and_strides(fresh.sizes(), fresh.strides(), t.storage_offset());
  } else {
    if (t.numel() && t.is_contiguous()) std::memcpy(fresh.data_ptr(), t.data_ptr(), t.nbytes());
    take_over(t, fresh);
  }
  return t;
}

at::Tensor& set_storage(at::Tensor& t, at::Storage storage, int64_t offset, c10::IntArrayRef sizes, c10::IntArrayRef strides) {
  t.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(storage));
  t.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, strides, offset);
  return t;
}

at::Tensor& set_tensor(at::Tensor& t, const at::Tensor& from) {
  take_over(t, from);
  return t;
}

}  // namespace

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&any_operation>()); }
TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("copy_", copy);
  m.impl("_local_scalar_dense", item);
  m.impl("as_strided", as_strided);
  m.impl("resize_", resize);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("set_.source_Tensor", set_tensor);
}

extern "C" {
void card_count(int count) { cards = count; }
void card_use(int index) { current = DeviceIndex(index); }
int card_current() { return current; }
void card_limit(int card, int64_t bytes) { memory[card].limit = bytes; }
int64_t card_held(int card) { return memory[card].held; }
int64_t card_peak(int card) { return memory[card].peak; }
int64_t card_launches() { return launches; }
int64_t card_waits() { return waits; }
int64_t card_to() { return to_card; }
int64_t card_from() { return from_card; }
// Fail with this message at the launch after so many, and ever after.
void card_fails_after(int64_t count, const char* message) {
  failure = message;
  fails_after = count;
}
void card_reset() {
  launches = waits = to_card = from_card = 0;
  for (auto& of : memory) of.peak = of.held.load();
}
}
