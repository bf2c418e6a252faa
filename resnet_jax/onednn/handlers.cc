// XLA FFI handlers for convolution, batch normalization, max-pool and their gradients by oneDNN, which caches its
// primitives: https://uxlfoundation.github.io/oneDNN.
//
// Images are NHWC and kernels HWIO (the output channels of a group are contiguous), float32 or bfloat16, as in XLA.
// Padding is (kernel - 1) / 2 before, and as the size of the output requires after. oneDNN chooses its own layout for
// the kernel, which is small; images are not copied.

#include <cstdint>
#include <mutex>
#include <string>
#include <unordered_map>

#include "oneapi/dnnl/dnnl.hpp"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;
using Buffer = ffi::AnyBuffer;
using Result = ffi::Result<ffi::AnyBuffer>;
using Dims = ffi::AnyBuffer::Dimensions;
using dnnl::memory;
using Tag = memory::format_tag;

namespace {

dnnl::engine& Engine() {
  static dnnl::engine engine(dnnl::engine::kind::cpu, 0);
  return engine;
}

memory::data_type Type(ffi::DataType element) {
  return element == ffi::DataType::BF16 ? memory::data_type::bf16 : memory::data_type::f32;
}

memory::desc Images(Dims x, ffi::DataType element) {
  return memory::desc({x[0], x[3], x[1], x[2]}, Type(element), Tag::nhwc);
}

// Descriptors of a convolution: tensors in the layout of XLA, and the kernel in the layout preferred by oneDNN.
struct Convolution {
  memory::desc images, kernel, any_kernel, output;
  memory::dims strides, before, after;

  Convolution(Dims x, Dims w, Dims y, ffi::DataType element, int64_t stride, int64_t groups) {
    images = Images(x, element);
    output = Images(y, element);
    memory::dims size = groups == 1 ? memory::dims{w[3], w[2], w[0], w[1]}
                                    : memory::dims{groups, w[3] / groups, w[2], w[0], w[1]};
    kernel = memory::desc(size, Type(element), groups == 1 ? Tag::hwio : Tag::hwigo);
    any_kernel = memory::desc(size, Type(element), Tag::any);
    strides = {stride, stride};
    for (int axis : {0, 1}) {
      before.push_back((w[axis] - 1) / 2);
      after.push_back((y[1 + axis] - 1) * stride + w[axis] - x[1 + axis] - before.back());
    }
  }

  dnnl::convolution_forward::primitive_desc Forward() const {
    return {Engine(), dnnl::prop_kind::forward_training, dnnl::algorithm::convolution_direct,
            images, any_kernel, output, strides, before, after};
  }
};

memory At(const memory::desc& desc, const Buffer& buffer) { return memory(desc, Engine(), buffer.untyped_data()); }

// Returns `data` itself, or a copy in the layout `wanted`.
memory Reordered(dnnl::stream& stream, const memory& data, const memory::desc& wanted) {
  if (data.get_desc() == wanted) return data;
  memory copy(wanted, Engine());
  dnnl::reorder(data, copy).execute(stream, const_cast<memory&>(data), copy);
  return copy;
}

// XLA runs independent calls in several threads at once. Each call uses all cores, so concurrent calls only wait for
// each other: running them one by one makes a step of ResNet-20 10 % faster.
std::mutex turn;

template <typename Run>
ffi::Error Guarded(Run run) {
  std::lock_guard<std::mutex> lock(turn);
  try {
    dnnl::stream stream(Engine());
    run(stream);
    stream.wait();
    return ffi::Error::Success();
  } catch (const std::exception& error) {
    return ffi::Error(ffi::ErrorCode::kInternal, std::string("oneDNN: ") + error.what());
  }
}

ffi::Error Convolve(Buffer x, Buffer w, Result y, int64_t stride, int64_t groups) {
  return Guarded([&](dnnl::stream& stream) {
    Convolution conv(x.dimensions(), w.dimensions(), y->dimensions(), x.element_type(), stride, groups);
    auto desc = conv.Forward();
    memory kernel = Reordered(stream, At(conv.kernel, w), desc.weights_desc());
    dnnl::convolution_forward(desc).execute(
        stream,
        {{DNNL_ARG_SRC, At(conv.images, x)}, {DNNL_ARG_WEIGHTS, kernel}, {DNNL_ARG_DST, At(conv.output, *y)}});
  });
}

ffi::Error InputGradient(Buffer w, Buffer g, Result x, int64_t stride, int64_t groups) {
  return Guarded([&](dnnl::stream& stream) {
    Convolution conv(x->dimensions(), w.dimensions(), g.dimensions(), g.element_type(), stride, groups);
    dnnl::convolution_backward_data::primitive_desc desc(
        Engine(), dnnl::algorithm::convolution_direct, conv.images, conv.any_kernel, conv.output, conv.strides,
        conv.before, conv.after, conv.Forward());
    memory kernel = Reordered(stream, At(conv.kernel, w), desc.weights_desc());
    dnnl::convolution_backward_data(desc).execute(
        stream, {{DNNL_ARG_DIFF_DST, At(conv.output, g)},
                 {DNNL_ARG_WEIGHTS, kernel},
                 {DNNL_ARG_DIFF_SRC, At(conv.images, *x)}});
  });
}

ffi::Error WeightGradient(Buffer x, Buffer g, Result w, int64_t stride, int64_t groups) {
  return Guarded([&](dnnl::stream& stream) {
    Convolution conv(x.dimensions(), w->dimensions(), g.dimensions(), g.element_type(), stride, groups);
    dnnl::convolution_backward_weights::primitive_desc desc(
        Engine(), dnnl::algorithm::convolution_direct, conv.images, conv.any_kernel, conv.output, conv.strides,
        conv.before, conv.after, conv.Forward());
    memory out = At(conv.kernel, *w);
    bool same = desc.diff_weights_desc() == conv.kernel;
    memory made = same ? out : memory(desc.diff_weights_desc(), Engine());
    dnnl::convolution_backward_weights(desc).execute(
        stream,
        {{DNNL_ARG_SRC, At(conv.images, x)}, {DNNL_ARG_DIFF_DST, At(conv.output, g)}, {DNNL_ARG_DIFF_WEIGHTS, made}});
    if (!same) dnnl::reorder(made, out).execute(stream, made, out);
  });
}

// Descriptors of batch normalization with optional ReLU.
struct Norm {
  memory::desc images, channels;
  dnnl::normalization_flags flags = dnnl::normalization_flags::use_scale | dnnl::normalization_flags::use_shift;
  float epsilon;

  Norm(const memory::desc& images, float epsilon, bool relu) : images(images), epsilon(epsilon) {
    channels = memory::desc({images.get_dims()[1]}, memory::data_type::f32, Tag::a);
    if (relu) flags |= dnnl::normalization_flags::fuse_norm_relu;
  }

  dnnl::batch_normalization_forward::primitive_desc Forward() const {
    return {Engine(), dnnl::prop_kind::forward_training, images, images, epsilon, flags};
  }
};

using Arguments = std::unordered_map<int, memory>;

ffi::Error Normalize(Buffer x, Buffer scale, Buffer shift, Result y, Result mean, Result variance, Result workspace,
                     float epsilon, bool relu) {
  return Guarded([&](dnnl::stream& stream) {
    Norm norm(Images(x.dimensions(), x.element_type()), epsilon, relu);
    auto desc = norm.Forward();
    Arguments arguments = {{DNNL_ARG_SRC, At(norm.images, x)},
                           {DNNL_ARG_DST, At(norm.images, *y)},
                           {DNNL_ARG_SCALE, At(norm.channels, scale)},
                           {DNNL_ARG_SHIFT, At(norm.channels, shift)},
                           {DNNL_ARG_MEAN, At(desc.mean_desc(), *mean)},
                           {DNNL_ARG_VARIANCE, At(desc.variance_desc(), *variance)}};
    if (relu) arguments.insert({DNNL_ARG_WORKSPACE, At(desc.workspace_desc(), *workspace)});
    dnnl::batch_normalization_forward(desc).execute(stream, arguments);
  });
}

ffi::Error NormGradient(Buffer x, Buffer scale, Buffer mean, Buffer variance, Buffer workspace, Buffer g, Result dx,
                        Result dscale, Result dshift, float epsilon, bool relu) {
  return Guarded([&](dnnl::stream& stream) {
    Norm norm(Images(x.dimensions(), x.element_type()), epsilon, relu);
    dnnl::batch_normalization_backward::primitive_desc desc(
        Engine(), dnnl::prop_kind::backward, norm.images, norm.images, norm.images, epsilon, norm.flags,
        norm.Forward());
    Arguments arguments = {{DNNL_ARG_SRC, At(norm.images, x)},
                           {DNNL_ARG_DIFF_DST, At(norm.images, g)},
                           {DNNL_ARG_DIFF_SRC, At(norm.images, *dx)},
                           {DNNL_ARG_SCALE, At(norm.channels, scale)},
                           {DNNL_ARG_MEAN, At(desc.mean_desc(), mean)},
                           {DNNL_ARG_VARIANCE, At(desc.variance_desc(), variance)},
                           {DNNL_ARG_DIFF_SCALE, At(norm.channels, *dscale)},
                           {DNNL_ARG_DIFF_SHIFT, At(norm.channels, *dshift)}};
    if (relu) arguments.insert({DNNL_ARG_WORKSPACE, At(desc.workspace_desc(), workspace)});
    dnnl::batch_normalization_backward(desc).execute(stream, arguments);
  });
}

// Descriptors of a 3x3 max-pool with stride 2 and padding 1.
struct Pool {
  memory::desc images, output;
  memory::dims strides = {2, 2}, window = {3, 3}, dilation = {0, 0}, before = {1, 1}, after;

  explicit Pool(const memory::desc& images) : images(images) {
    auto size = images.get_dims();
    for (int axis : {2, 3}) {
      auto pooled = (size[axis] + 1) / 2;
      after.push_back((pooled - 1) * 2 + 3 - size[axis] - 1);
      size[axis] = pooled;
    }
    output = memory::desc(size, images.get_data_type(), Tag::nhwc);
  }

  dnnl::pooling_forward::primitive_desc Forward() const {
    return {Engine(), dnnl::prop_kind::forward_training, dnnl::algorithm::pooling_max, images, output,
            strides,  window, dilation, before, after};
  }
};

ffi::Error MaxPool(Buffer x, Result y, Result workspace) {
  return Guarded([&](dnnl::stream& stream) {
    Pool pool(Images(x.dimensions(), x.element_type()));
    auto desc = pool.Forward();
    dnnl::pooling_forward(desc).execute(stream, {{DNNL_ARG_SRC, At(pool.images, x)},
                                                 {DNNL_ARG_DST, At(pool.output, *y)},
                                                 {DNNL_ARG_WORKSPACE, At(desc.workspace_desc(), *workspace)}});
  });
}

ffi::Error MaxPoolGradient(Buffer workspace, Buffer g, Result x) {
  return Guarded([&](dnnl::stream& stream) {
    Pool pool(Images(x->dimensions(), x->element_type()));
    auto forward = pool.Forward();
    dnnl::pooling_backward::primitive_desc desc(Engine(), dnnl::algorithm::pooling_max, pool.images, pool.output,
                                                pool.strides, pool.window, pool.dilation, pool.before, pool.after,
                                                forward);
    dnnl::pooling_backward(desc).execute(stream, {{DNNL_ARG_DIFF_DST, At(pool.output, g)},
                                                  {DNNL_ARG_DIFF_SRC, At(pool.images, *x)},
                                                  {DNNL_ARG_WORKSPACE, At(forward.workspace_desc(), workspace)}});
  });
}

memory::desc Described(int64_t n, int64_t h, int64_t w, int64_t c, bool half) {
  return memory::desc({n, c, h, w}, half ? memory::data_type::bf16 : memory::data_type::f32, Tag::nhwc);
}

}  // namespace

// Returns the bytes of the workspace of a max-pool, or -1 if oneDNN does not support it.
extern "C" int64_t max_pool_workspace(int64_t n, int64_t h, int64_t w, int64_t c, bool half) try {
  return Pool(Described(n, h, w, c, half)).Forward().workspace_desc().get_size();
} catch (const std::exception&) {
  return -1;
}

// Returns the bytes of the workspace of a normalization with ReLU, which XLA must know beforehand, or -1.
extern "C" int64_t norm_workspace(int64_t n, int64_t h, int64_t w, int64_t c, bool half) try {
  return Norm(Described(n, h, w, c, half), 1e-5f, true).Forward().workspace_desc().get_size();
} catch (const std::exception&) {
  return -1;
}

#define TWO_TO_ONE \
  ffi::Ffi::Bind().Arg<Buffer>().Arg<Buffer>().Ret<Buffer>().Attr<int64_t>("stride").Attr<int64_t>("groups")

XLA_FFI_DEFINE_HANDLER_SYMBOL(convolution, Convolve, TWO_TO_ONE);
XLA_FFI_DEFINE_HANDLER_SYMBOL(input_gradient, InputGradient, TWO_TO_ONE);
XLA_FFI_DEFINE_HANDLER_SYMBOL(weight_gradient, WeightGradient, TWO_TO_ONE);

XLA_FFI_DEFINE_HANDLER_SYMBOL(norm, Normalize,
                              ffi::Ffi::Bind()
                                  .Arg<Buffer>().Arg<Buffer>().Arg<Buffer>()
                                  .Ret<Buffer>().Ret<Buffer>().Ret<Buffer>().Ret<Buffer>()
                                  .Attr<float>("epsilon").Attr<bool>("relu"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(norm_gradient, NormGradient,
                              ffi::Ffi::Bind()
                                  .Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>()
                                  .Ret<Buffer>().Ret<Buffer>().Ret<Buffer>()
                                  .Attr<float>("epsilon").Attr<bool>("relu"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(max_pool, MaxPool, ffi::Ffi::Bind().Arg<Buffer>().Ret<Buffer>().Ret<Buffer>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(max_pool_gradient, MaxPoolGradient,
                              ffi::Ffi::Bind().Arg<Buffer>().Arg<Buffer>().Ret<Buffer>());
