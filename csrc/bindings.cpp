// The Python module g2rpo_kernels._C: submodule `cpu`, and `cuda` where nvcc was there to build it.
//
// Both have the same functions with the same arguments, in the order of ops.h: addresses as
// integers (0: not given), dtypes by number (the order of `Dtype`), last `device` and `stream`, which
// the CPU ignores. g2rpo_kernels/native.py and optim/native.py are their only callers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "ops.h"

namespace py = pybind11;
using namespace g2rpo;

namespace {

using Address = uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

Array array(Address data, int dtype) { return {at<const void>(data), static_cast<Dtype>(dtype)}; }

// Op is a function of namespace cpu, which cannot fail, or of cuda, which returns what went wrong.
template <auto Op, class Arguments>
void run(const Arguments& arguments, int device, Address stream) {
  if constexpr (std::is_invocable_v<decltype(Op), const Arguments&>) {
    py::gil_scoped_release release;
    Op(arguments);
  } else {
    const char* error = Op(arguments, {device, at<void>(stream)});
    if (error) throw std::runtime_error(std::string("CUDA: ") + error);
  }
}

template <auto Op>
void define_step_mean(py::module_& m) {
  m.def("step_mean", [](Address velocity, int velocity_dtype, Address latents, int latents_dtype,
                        Address table, int64_t table_stride, int64_t rows, int64_t count,
                        Address mean, int device, Address stream) {
    run<Op>(StepMean{{array(velocity, velocity_dtype), array(latents, latents_dtype),
                      at<const float>(table), table_stride, rows, 1, count},
                     at<float>(mean)},
            device, stream);
  });
}

template <auto Op>
void define_ode_step(py::module_& m) {
  m.def("ode_step", [](Address velocity, int velocity_dtype, Address latents, int latents_dtype,
                       Address sigma, int64_t sigma_stride, Address sigma_next,
                       int64_t sigma_next_stride, int64_t rows, int64_t count, Address x_next,
                       int device, Address stream) {
    run<Op>(OdeStep{array(velocity, velocity_dtype), array(latents, latents_dtype),
                    at<const float>(sigma), at<const float>(sigma_next), sigma_stride,
                    sigma_next_stride, rows, count, at<float>(x_next)},
            device, stream);
  });
}

template <auto Op>
void define_normal(py::module_& m) {
  m.def("normal", [](Address seeds, int64_t seed_count, int64_t count, Address noise, int device,
                     Address stream) {
    run<Op>(Normal{at<const int64_t>(seeds), seed_count, count, at<float>(noise)}, device, stream);
  });
}

template <auto Op>
void define_sde_step(py::module_& m) {
  m.def("sde_step", [](Address velocity, int velocity_dtype, Address latents, int latents_dtype,
                       Address table, int64_t table_stride, int64_t rows, int64_t branches,
                       int64_t count, Address seeds, Address noise, int noise_dtype,
                       Address x_next, Address log_prob, Address scratch, int device,
                       Address stream) {
    run<Op>(SdeStep{{array(velocity, velocity_dtype), array(latents, latents_dtype),
                     at<const float>(table), table_stride, rows, branches, count},
                    at<const int64_t>(seeds), array(noise, noise_dtype), at<float>(x_next),
                    at<float>(log_prob), at<float>(scratch)},
            device, stream);
  });
}

template <auto Op>
void define_branch_log_prob(py::module_& m) {
  m.def("branch_log_prob", [](Address velocity, int velocity_dtype, Address latents,
                              int latents_dtype, Address table, int64_t table_stride, int64_t rows,
                              int64_t branches, int64_t count, Address x_next, int x_next_dtype,
                              Address log_prob, Address scratch, int device, Address stream) {
    run<Op>(BranchLogProb{{array(velocity, velocity_dtype), array(latents, latents_dtype),
                           at<const float>(table), table_stride, rows, branches, count},
                          array(x_next, x_next_dtype), at<float>(log_prob), at<float>(scratch)},
            device, stream);
  });
}

template <auto Op>
void define_policy_loss(py::module_& m) {
  m.def("policy_loss", [](Address velocity, int velocity_dtype, Address latents, int latents_dtype,
                          Address table, int64_t table_stride, int64_t rows, int64_t branches,
                          int64_t count, Address x_next, int x_next_dtype, Address old_log_prob,
                          Address advantages, Address reference_velocity, int reference_dtype,
                          Address old_velocity, int old_dtype, float low, float high,
                          float clip_range, float advantage_clip, float kl_weight, Address loss,
                          Address log_prob, Address grad_log_prob, Address statistics,
                          Address scratch, int device, Address stream) {
    run<Op>(PolicyLoss{{array(velocity, velocity_dtype), array(latents, latents_dtype),
                        at<const float>(table), table_stride, rows, branches, count},
                       array(x_next, x_next_dtype), at<const float>(old_log_prob),
                       at<const float>(advantages), array(reference_velocity, reference_dtype),
                       array(old_velocity, old_dtype),
                       {low, high, clip_range, advantage_clip, kl_weight},
                       at<float>(loss), at<float>(log_prob), at<float>(grad_log_prob),
                       at<float>(statistics), at<float>(scratch)},
            device, stream);
  });
}

template <auto Op>
void define_log_prob_backward(py::module_& m) {
  m.def("log_prob_backward", [](Address velocity, int velocity_dtype, Address latents,
                                int latents_dtype, Address table, int64_t table_stride,
                                int64_t rows, int64_t branches, int64_t count, Address x_next,
                                int x_next_dtype, Address grad_log_prob, Address scale,
                                Address old_velocity, int old_dtype, Address reference_velocity,
                                int reference_dtype, float kl_weight, Address grad_velocity,
                                int device, Address stream) {
    run<Op>(LogProbBackward{{array(velocity, velocity_dtype), array(latents, latents_dtype),
                             at<const float>(table), table_stride, rows, branches, count},
                            array(x_next, x_next_dtype), at<const float>(grad_log_prob),
                            at<const float>(scale), array(old_velocity, old_dtype),
                            array(reference_velocity, reference_dtype), kl_weight,
                            at<void>(grad_velocity)},
            device, stream);
  });
}

template <auto Op>
void define_group_advantages(py::module_& m) {
  m.def("group_advantages", [](Address rewards, int rewards_dtype, int64_t models,
                               int64_t granularities, int64_t groups, int64_t group_size,
                               int64_t positions, const std::vector<double>& weights, double eps,
                               Address advantages, int device, Address stream) {
    run<Op>(GroupAdvantages{array(rewards, rewards_dtype), models, granularities, groups,
                            group_size, positions, weights.empty() ? nullptr : weights.data(), eps,
                            at<float>(advantages)},
            device, stream);
  });
}

template <auto Op>
void define_adamw8bit(py::module_& m) {
  m.def("adamw8bit", [](Address tensors, int64_t tensor_count, Address chunks, int64_t chunk_count,
                        int64_t block_size, int param_dtype, int grad_dtype, int low_bytes,
                        bool dynamic, bool zero_grad, const std::array<float, 9>& k, int device,
                        Address stream) {
    run<Op>(Adamw8bit{at<const AdamwTensor>(tensors), tensor_count, at<const int32_t>(chunks),
                      chunk_count, block_size, static_cast<Dtype>(param_dtype),
                      static_cast<Dtype>(grad_dtype), low_bytes, dynamic, zero_grad,
                      {k[0], k[1], k[2], k[3], k[4], k[5], k[6], k[7], k[8]}},
            device, stream);
  });
  m.attr("adamw_chunk") = adamw_chunk;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native ops of g2rpo_kernels; called through its native and optim.native alone.";
  py::module_ on_cpu = m.def_submodule("cpu");
  define_step_mean<cpu::step_mean>(on_cpu);
  define_ode_step<cpu::ode_step>(on_cpu);
  define_normal<cpu::normal>(on_cpu);
  define_sde_step<cpu::sde_step>(on_cpu);
  define_branch_log_prob<cpu::branch_log_prob>(on_cpu);
  define_policy_loss<cpu::policy_loss>(on_cpu);
  define_log_prob_backward<cpu::log_prob_backward>(on_cpu);
  define_group_advantages<cpu::group_advantages>(on_cpu);
  define_adamw8bit<cpu::adamw8bit>(on_cpu);
  on_cpu.def("variant", &cpu::variant, "The vector variant in use: avx512, avx2 or default.");
  on_cpu.def("philox", [](uint64_t counter, uint64_t seed) {  // for tests
    const Words w = philox(counter, seed);
    return py::make_tuple(w.w0, w.w1, w.w2, w.w3);
  });
#ifdef G2RPO_CUDA
  py::module_ on_cuda = m.def_submodule("cuda");
  define_step_mean<cuda::step_mean>(on_cuda);
  define_ode_step<cuda::ode_step>(on_cuda);
  define_normal<cuda::normal>(on_cuda);
  define_sde_step<cuda::sde_step>(on_cuda);
  define_branch_log_prob<cuda::branch_log_prob>(on_cuda);
  define_policy_loss<cuda::policy_loss>(on_cuda);
  define_log_prob_backward<cuda::log_prob_backward>(on_cuda);
  define_group_advantages<cuda::group_advantages>(on_cuda);
  define_adamw8bit<cuda::adamw8bit>(on_cuda);
  on_cuda.def("scratch_size", &cuda::scratch_size);
  on_cuda.def("probe", [](int device) -> py::object {
    const char* error = cuda::probe(device);
    return error ? py::object(py::str(error)) : py::object(py::none());
  });
  on_cuda.attr("archs") = G2RPO_CUDA_ARCHS;  // compute capabilities with code, "80,90,100"
  on_cuda.attr("most_models") = cuda::most_models;
#endif
}
