// A stand-in for a CUDA device: "cuda:N" whose memory is the host's and whose kernels are the CPU's.
//
// A CPU build of PyTorch leaves the dispatch key CUDA empty. This file registers a boxed fallback there, which shows each
// operation's tensors to the CPU's kernel as views of the same memory. It counts kernel launches, waits for the device and
// bytes moved, keeps the peak of the memory, refuses to allocate beyond a limit, and fails on request as a lost card does.
//
// All is done at once, in whatever stream; but what a stream wrote is refused to another that hasn't waited for it, and
// memory that is given back while another stream may still use it is counted.
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
#include <map>
#include <mutex>
#include <string>
#include <unordered_set>
#include <vector>

namespace {

using c10::DeviceIndex;
using c10::IValue;
constexpr int kCards = 8;
const c10::DispatchKeySet kKeys(c10::DispatchKey::CUDA);

std::atomic<int> cards{1};
// ``aside``: bytes to the card from pinned memory on another stream than the default; ``event_waits``: a thread waited for
// one event, not for all that was launched.
std::atomic<int64_t> launches{0}, waits{0}, to_card{0}, from_card{0}, aside{0}, event_waits{0}, fails_after{-1};
std::string failure;
thread_local DeviceIndex current = 0;

// Streams: the one in use in this thread, the last that was made, and how far each has waited for each other.
thread_local c10::StreamId stream = 0;
std::atomic<c10::StreamId> last_stream{0};
std::atomic<int64_t> clock_{0}, unrecorded{0};
std::mutex mutex;
std::map<std::pair<c10::StreamId, c10::StreamId>, int64_t> waited;
struct Event {
  c10::StreamId of;
  int64_t at;
};

std::mutex pinned_mutex;
std::map<const char*, size_t> pinned;  // by where it begins

struct Memory {
  std::atomic<int64_t> held{0}, peak{0}, limit{0};
};
std::array<Memory, kCards> memory;
std::array<std::atomic<int64_t>, kCards> launches_on{};  // of each card

void launch(DeviceIndex card) {
  launches++;
  launches_on[card]++;
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
  // The stream that wrote it last, when, and whether another used it, and said so (Tensor.record_stream).
  std::atomic<c10::StreamId> of{0};
  std::atomic<int64_t> at{0};
  std::atomic<bool> elsewhere{false}, recorded{false};
};

void give_back(void* pointer) {
  auto* block = static_cast<Block*>(pointer);
  if (block->elsewhere && !block->recorded) unrecorded++;
  memory[block->card].held -= block->bytes;
  c10::free_cpu(block->data);
  delete block;
}

// A tensor's memory is used in this thread's stream.
void used(const at::Tensor& t, bool written) {
  auto* block = t.has_storage() ? static_cast<Block*>(t.storage().data_ptr().get_context()) : nullptr;
  if (block == nullptr) return;
  if (block->of != stream) {
    std::lock_guard<std::mutex> lock(mutex);
    const int64_t until = waited[std::make_pair(stream, block->of.load())];
    TORCH_CHECK(
        until >= block->at, "stream ", stream, " uses what stream ", block->of.load(),
        " writes, and hasn't waited for it");
    if (block->of != 0) block->elsewhere = true;
  }
  if (written) {
    block->of = stream;
    block->at = ++clock_;
  }
}

struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t asked) override {
    void* data = c10::alloc_cpu(asked);
    std::lock_guard<std::mutex> lock(pinned_mutex);
    pinned[static_cast<const char*>(data)] = asked;
    return {data, data, &free, c10::Device(c10::DeviceType::CPU)};
  }
  static void free(void* data) {
    std::lock_guard<std::mutex> lock(pinned_mutex);
    pinned.erase(static_cast<const char*>(data));
    c10::free_cpu(data);
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};
PinnedAllocator pinned_allocator;

bool is_pinned(const void* pointer) {
  const auto* data = static_cast<const char*>(pointer);
  std::lock_guard<std::mutex> lock(pinned_mutex);
  auto after = pinned.upper_bound(data);
  return after != pinned.begin() && data < (--after)->first + after->second;
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
    block->of = stream;
    block->at = ++clock_;
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
  c10::Device whole(c10::Device of) const { return of.has_index() ? of : c10::Device(of.type(), current); }
  c10::Stream stream_of(c10::StreamId id, c10::Device of) const { return c10::Stream(c10::Stream::UNSAFE, whole(of), id); }
  c10::Stream getStream(c10::Device of) const noexcept override { return stream_of(stream, of); }
  c10::Stream getDefaultStream(c10::Device of) const override { return c10::Stream(c10::Stream::DEFAULT, of); }
  c10::Stream getNewStream(c10::Device of, int) const override { return stream_of(++last_stream, of); }
  c10::Stream exchangeStream(c10::Stream to) const noexcept override {
    const auto before = stream_of(stream, to.device());
    stream = to.id();
    return before;
  }
  void record(void** event, const c10::Stream& of, DeviceIndex, c10::EventFlag) const override {
    if (*event == nullptr) *event = new Event();
    *static_cast<Event*>(*event) = {of.id(), clock_};
  }
  void block(void* event, const c10::Stream& waiting) const override {
    const auto* seen = static_cast<Event*>(event);
    std::lock_guard<std::mutex> lock(mutex);
    auto& until = waited[{waiting.id(), seen->of}];
    until = std::max(until, seen->at);
  }
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override { event_waits++; }
  void destroyEvent(void* event, const DeviceIndex) const noexcept override { delete static_cast<Event*>(event); }
  void recordDataPtrOnStream(const c10::DataPtr& data, const c10::Stream&) const override {
    if (auto* block = static_cast<Block*>(data.get_context())) block->recorded = true;
  }
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
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
};

}  // namespace
namespace at {
using CUDAHooks = ::Hooks;
REGISTER_CUDA_HOOKS(CUDAHooks);
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
      used(t, false);
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
  if (computed) launch(card);
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
  if (on_card(from)) used(from, false);
  if (on_card(to)) used(to, true);
  // From memory that isn't pinned a card's driver copies itself, and the thread waits whatever it asked for.
  const bool goes_on = non_blocking && is_pinned((on_card(to) ? from : to).const_data_ptr());
  if (on_card(to) && on_card(from)) {
    launch(to.device().index());
  } else if (on_card(to)) {
    to_card += bytes;
    waits += !goes_on;
    if (goes_on && stream != 0) aside += bytes;
  } else {
    from_card += bytes;
    waits += !goes_on;
  }
  seen_by_cpu(to).copy_(seen_by_cpu(from));
  return to;
}

// As a card multiplies halves: exactly, with sums in the dtype of the result. The CPU has no such kernel.
at::Tensor& addmm_summed(
    const at::Tensor& to, const at::Tensor& left, const at::Tensor& right, at::ScalarType sums, const at::Scalar& beta,
    const at::Scalar& alpha, at::Tensor& out) {
  TORCH_CHECK(
      left.scalar_type() == right.scalar_type() && sums == at::kFloat && out.scalar_type() == sums && to.scalar_type() == sums,
      "addmm: out_dtype must be that of the result, and float32 for halves");
  for (const auto* each : {&to, &left, &right}) {
    TORCH_CHECK(on_card(*each), "Expected all tensors to be on the same device, but found at least two devices");
    used(*each, false);
  }
  used(out, true);
  launch(out.device().index());
  auto result = seen_by_cpu(out);
  result.copy_(at::addmm(seen_by_cpu(to), seen_by_cpu(left).to(sums), seen_by_cpu(right).to(sums), beta, alpha));
  return out;
}

at::Scalar item(const at::Tensor& t) {
  waits++;
  used(t, false);
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

void record_stream(at::Tensor& t, c10::Stream) {
  if (auto* block = static_cast<Block*>(t.storage().data_ptr().get_context())) block->recorded = true;
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
  m.impl("record_stream", record_stream);
  m.impl("addmm.dtype_out", addmm_summed);
}

extern "C" {
void card_count(int count) { cards = count; }
void card_use(int index) { current = DeviceIndex(index); }
int card_current() { return current; }
void card_limit(int card, int64_t bytes) { memory[card].limit = bytes; }
int64_t card_held(int card) { return memory[card].held; }
int64_t card_peak(int card) { return memory[card].peak; }
int64_t card_launches() { return launches; }
int64_t card_launches_on(int card) { return launches_on[card]; }
int64_t card_waits() { return waits; }
int64_t card_to() { return to_card; }
int64_t card_from() { return from_card; }
int64_t card_aside() { return aside; }
int64_t card_event_waits() { return event_waits; }
int64_t card_unrecorded() { return unrecorded; }
// Fail with this message at the launch after so many, and ever after.
void card_fails_after(int64_t count, const char* message) {
  failure = message;
  fails_after = count;
}
void card_reset() {
  launches = waits = to_card = from_card = aside = event_waits = unrecorded = 0;
  for (auto& on : launches_on) on = 0;
  for (auto& of : memory) of.peak = of.held.load();
}
}
