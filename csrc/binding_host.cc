// SPDX-License-Identifier: MIT
// tvm-ffi exports of the host planner, and every check of the tensors it is given.
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/function.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <utility>

#include "host/planner.h"

namespace {

namespace ffi = tvm::ffi;

/// Elements of a contiguous 1-D int32 tensor on the host.
int32_t* data_of(const ffi::TensorView& tensor, const char* name) {
  const DLDataType type = tensor.dtype();
  if (type.code != kDLInt || type.bits != 32 || type.lanes != 1) {
    TVM_FFI_THROW(TypeError) << name << " has dtype " << type << ", not int32";
  }
  const auto device = tensor.device().device_type;
  if (device != kDLCPU && device != kDLCUDAHost) {
    TVM_FFI_THROW(ValueError) << name << " is on device type " << device << ", not on the host";
  }
  // An empty array comes with any stride.
  if (tensor.ndim() != 1 || (tensor.size(0) > 0 && !tensor.IsContiguous())) {
    TVM_FFI_THROW(ValueError) << name << " is not a contiguous 1-D tensor (" << tensor.ndim()
                              << " dimensions)";
  }
  return reinterpret_cast<int32_t*>(static_cast<char*>(tensor.data_ptr()) + tensor.byte_offset());
}

int32_t size_of(const ffi::TensorView& tensor, const char* name) {
  if (tensor.size(0) > INT32_MAX) {
    TVM_FFI_THROW(ValueError) << name << " has " << tensor.size(0) << " elements, 2^31 or more";
  }
  return static_cast<int32_t>(tensor.size(0));
}

/// parent, length: int32 [nodes]; leaf_of_row, host_lens: int32 [rows]; out: int32 [words]. Returns
/// the words written, or -1 when the batch does not fit; describe_failure() then says why.
struct PlanFunction {
  std::shared_ptr<pat::Planner> planner;
  std::shared_ptr<std::string> failure;

  int64_t operator()(ffi::TensorView parent, ffi::TensorView length, ffi::TensorView leaf_of_row,
                     ffi::TensorView host_lens, ffi::TensorView out) const {
    const pat::Batch batch{data_of(parent, "parent"),       data_of(length, "length"),
                           size_of(parent, "parent"),       data_of(leaf_of_row, "leaf_of_row"),
                           data_of(host_lens, "host_lens"), size_of(host_lens, "host_lens")};
    if (length.size(0) != parent.size(0)) {
      TVM_FFI_THROW(ValueError) << "parent has " << parent.size(0) << " nodes, length has "
                                << length.size(0);
    }
    if (leaf_of_row.size(0) != host_lens.size(0)) {
      TVM_FFI_THROW(ValueError) << "leaf_of_row has " << leaf_of_row.size(0)
                                << " rows, host_lens has " << host_lens.size(0);
    }
    try {
      return planner->plan(batch, data_of(out, "out"), out.size(0));
    } catch (const pat::CapacityError& error) {
      // Not thrown: tvm-ffi would turn a kind it does not know into a RuntimeError.
      *failure = error.what();
      return -1;
    } catch (const std::invalid_argument& error) {
      TVM_FFI_THROW(ValueError) << error.what();
    }
    return -1;
  }
};

/// Numbers of pat_sglang.packing.Shape, .cost.CostModel.words() and .layout.Capacity, in order.
/// Returns the plan function of a new planner, and the function that describes its last failure.
ffi::Array<ffi::Function> create_planner(const ffi::Array<int64_t>& shape,
                                         const ffi::Array<int64_t>& model,
                                         const ffi::Array<int64_t>& capacity) {
  constexpr size_t kModelWords = 5 + 5 * pat::kNumTiles;
  if (shape.size() != 5 || model.size() != kModelWords || capacity.size() != 2) {
    TVM_FFI_THROW(ValueError) << "create_planner takes 5 shape, " << kModelWords
                              << " model and 2 capacity values, got " << shape.size() << ", "
                              << model.size() << ", " << capacity.size();
  }
  for (const int i : {0, 1}) {
    if (shape[i] < 1 || shape[i] > INT32_MAX) {
      TVM_FFI_THROW(ValueError) << (i == 0 ? "group_size = " : "num_kv_heads = ") << shape[i]
                                << " is out of range [1, 2^31)";
    }
  }
  if (shape[4] < 0 || shape[4] > 2) {
    TVM_FFI_THROW(ValueError) << "sharing = " << shape[4] << " is not 0 (auto), 1 (on) or 2 (off)";
  }
  const pat::Shape pat_shape{static_cast<int32_t>(shape[0]), static_cast<int32_t>(shape[1]),
                             shape[2], shape[3], static_cast<pat::Sharing>(shape[4])};
  pat::CostModel costs{};
  size_t at = 0;
  costs.num_sms = model[at++];
  for (int64_t* prices :
       {costs.item_ps, costs.token_ps, costs.reread_ps, costs.solo_item_ps, costs.solo_token_ps}) {
    for (int32_t k = 0; k < pat::kNumTiles; ++k) prices[k] = model[at++];
  }
  costs.private_token_ps = model[at++];
  costs.part_ps = model[at++];
  costs.step_ps = model[at++];
  costs.merge_ps = model[at];
  try {
    auto failure = std::make_shared<std::string>();
    auto planner =
        std::make_shared<pat::Planner>(pat_shape, costs, pat::Capacity{capacity[0], capacity[1]});
    return {ffi::Function::FromTyped(PlanFunction{std::move(planner), failure}),
            ffi::Function::FromTyped([failure]() { return ffi::String(*failure); })};
  } catch (const std::invalid_argument& error) {
    TVM_FFI_THROW(ValueError) << error.what();
  }
  return {};
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(create_planner, create_planner);
