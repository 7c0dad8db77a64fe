/* Batch Normalization on the CPU: the C interface of the crate batchnorm.
 *
 * This file is made by cbindgen. Do not edit it.
 *
 * - Every function that can be refused returns a `bn_status`; then no output was touched. `bn_error_message` tells what a
 *   code means, and `bn_last_error` what was expected and what was got, for the last refusal on this thread.
 * - Every pointer to values comes with the number of elements behind it. A wrong number, a null pointer, one that is not
 *   aligned for its type and overlapping arguments are refused, not followed.
 * - Tensors are of the plan's dtype: float, double, or uint16_t with the bits of bf16 or f16. Parameters and statistics
 *   (gamma, beta, mean, var, and their gradients) are double for double and float for all others.
 * - What is optional or not wanted is NULL with a length of 0.
 * - The output of a forward pass may be its input, and dx may be dy: then it is computed in place. No other arguments may
 *   overlap one that is written.
 * - Handles are made by `..._new` and ended by `..._free`. A handle that was freed must not be used again: that is not
 *   noticed. A function that takes a handle as const may be called from several threads at once; one that does not needs it
 *   for itself.
 * - Large tensors are shared among threads of a pool that the first large pass starts, as many as the machine has, or the
 *   environment variable RAYON_NUM_THREADS says. A child made by fork() has none of them: there, `bn_plan_set_threads(plan, 1)`.
 */


#ifndef BATCHNORM_H
#define BATCHNORM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/*
 The version of the binary interface that this header declares; `bn_abi_version` tells that of the library. It grows when a
 program that was compiled with an older header could no longer run, and for nothing else: new functions and new values of
 enumerations leave it alone.
 */
#define BN_ABI_VERSION 1

/*
 What became of a call. Later versions may add codes.
 */
enum bn_status
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  /*
   Done.
   */
  BN_STATUS_OK = 0,
  /*
   A null pointer where one to something was expected.
   */
  BN_STATUS_NULL = 1,
  /*
   Another number of elements than the plan asks for.
   */
  BN_STATUS_LENGTH = 2,
  /*
   A pointer that is not aligned for its type.
   */
  BN_STATUS_ALIGNMENT = 3,
  /*
   Arguments that share memory.
   */
  BN_STATUS_OVERLAP = 4,
  /*
   A number that stands for no value of its enumeration.
   */
  BN_STATUS_CHOICE = 5,
  /*
   Statistics of another element type than the plan's.
   */
  BN_STATUS_DTYPE = 6,
  /*
   A shape without channels, or with more elements than memory has.
   */
  BN_STATUS_SHAPE = 7,
  /*
   No values to take statistics of.
   */
  BN_STATUS_EMPTY_BATCH = 8,
  /*
   `eps` is negative, infinite or NaN.
   */
  BN_STATUS_EPS = 9,
  /*
   A weight of running statistics outside 0 to 1.
   */
  BN_STATUS_MOMENTUM = 10,
  /*
   A variance that is negative or NaN.
   */
  BN_STATUS_VARIANCE = 11,
  /*
   The unbiased variance of one value.
   */
  BN_STATUS_UNBIASED_FROM_ONE = 12,
  /*
   Statistics that no batch has filled yet.
   */
  BN_STATUS_MISSING_STATISTICS = 13,
  /*
   Statistics of another number of values.
   */
  BN_STATUS_COUNT = 14,
  /*
   A slope of a leaky ReLU that is negative, infinite or NaN.
   */
  BN_STATUS_SLOPE = 15,
  /*
   Backward from the output behind an activation that cannot be undone.
   */
  BN_STATUS_NOT_INVERTIBLE = 16,
  /*
   Backward from the output with a gamma too close to zero.
   */
  BN_STATUS_GAMMA = 17,
  /*
   A SIMD tier that this CPU does not have.
   */
  BN_STATUS_TIER = 18,
  /*
   Not enough memory for statistics.
   */
  BN_STATUS_MEMORY = 19,
  /*
   Anything else that was refused.
   */
  BN_STATUS_REFUSED = 20,
  /*
   A defect of this library. Outputs may have been written.
   */
  BN_STATUS_PANIC = 21,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum bn_status bn_status;
#else
typedef int32_t bn_status;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/*
 What tensors hold.
 */
enum bn_dtype
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  /*
   float
   */
  BN_DTYPE_F32 = 0,
  /*
   double
   */
  BN_DTYPE_F64 = 1,
  /*
   The upper half of a float, as uint16_t.
   */
  BN_DTYPE_BF16 = 2,
  /*
   IEEE 754 binary16, as uint16_t.
   */
  BN_DTYPE_F16 = 3,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum bn_dtype bn_dtype;
#else
typedef int32_t bn_dtype;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/*
 Where the channel stands among the dimensions of a tensor.
 */
enum bn_layout
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  /*
   Batch, channels, spatial sizes: NCL, NCHW, NCDHW.
   */
  BN_LAYOUT_CHANNELS_FIRST = 0,
  /*
   Batch, spatial sizes, channels: NLC, NHWC, NDHWC. For NC, which has no spatial sizes, either will do.
   */
  BN_LAYOUT_CHANNELS_LAST = 1,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum bn_layout bn_layout;
#else
typedef int32_t bn_layout;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/*
 The SIMD instructions to run on. They change the speed and no bit of the results.
 */
enum bn_tier
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  /*
   The widest that this CPU has.
   */
  BN_TIER_BEST = 0,
  /*
   What every CPU of this architecture has.
   */
  BN_TIER_PORTABLE = 1,
  /*
   x86-64 with AVX2 and F16C.
   */
  BN_TIER_AVX2 = 2,
  /*
   x86-64 with AVX-512 F, BW, DQ and VL.
   */
  BN_TIER_AVX512 = 3,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum bn_tier bn_tier;
#else
typedef int32_t bn_tier;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/*
 What is applied to the normalized value, forward, and counted in, backward.
 */
enum bn_activation
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  /*
   Nothing.
   */
  BN_ACTIVATION_NONE = 0,
  /*
   The larger of the value and 0.
   */
  BN_ACTIVATION_RELU = 1,
  /*
   The value where it is positive, elsewhere a slope times it.
   */
  BN_ACTIVATION_LEAKY_RELU = 2,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum bn_activation bn_activation;
#else
typedef int32_t bn_activation;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/*
 How the weight of running statistics is meant. Frameworks differ, so there is no default.
 */
enum bn_momentum
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  /*
   The weight of the new value: PyTorch's momentum, 0.1 there.
   */
  BN_MOMENTUM_WEIGHT_OF_NEW = 0,
  /*
   The weight of the old value: momentum in Keras (0.99) and ONNX (0.9).
   */
  BN_MOMENTUM_WEIGHT_OF_OLD = 1,
  /*
   The plain average of all batches: PyTorch's momentum=None.
   */
  BN_MOMENTUM_CUMULATIVE = 2,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum bn_momentum bn_momentum;
#else
typedef int32_t bn_momentum;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/*
 Which variance of a batch enters the running variance. Frameworks differ, so there is no default.
 */
enum bn_variance
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  /*
   Divided by the number of values: ONNX, Keras.
   */
  BN_VARIANCE_BIASED = 0,
  /*
   Divided by one less: the paper, PyTorch, TensorFlow's fused operation.
   */
  BN_VARIANCE_UNBIASED = 1,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum bn_variance bn_variance;
#else
typedef int32_t bn_variance;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/*
 A statistic of a batch, one value per channel.
 */
enum bn_statistic
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  /*
   The mean.
   */
  BN_STATISTIC_MEAN = 0,
  /*
   What the mean has beyond its rounded value.
   */
  BN_STATISTIC_RESIDUE = 1,
  /*
   The biased variance.
   */
  BN_STATISTIC_VAR = 2,
  /*
   1 / sqrt(var + eps), and 0 where var + eps is 0.
   */
  BN_STATISTIC_INV_STD = 3,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum bn_statistic bn_statistic;
#else
typedef int32_t bn_statistic;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/*
 A plan: the shape, the element type and the options of passes.
 */
typedef struct bn_plan bn_plan;

/*
 The statistics of a batch, which a training forward pass leaves for the backward pass and for running statistics.
 */
typedef struct bn_saved bn_saved;

/*
 Count, mean and sum of squared deviations of the values of one channel.
 */
typedef struct bn_moments {
  /*
   The number of values.
   */
  uint64_t count;
  /*
   The mean; 0 for no values.
   */
  double mean;
  /*
   What the mean has beyond its rounded value; 0 where it is not known.
   */
  double residue;
  /*
   The sum of squared deviations from the mean.
   */
  double m2;
} bn_moments;

/*
 Sums over the values of one channel that the gradients are made of. Shards are joined by adding.
 */
typedef struct bn_gradient_sums {
  /*
   sum(dy), which is dbeta.
   */
  double dy;
  /*
   sum(dy * xhat), which is dgamma.
   */
  double dy_xhat;
} bn_gradient_sums;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/*
 What a status code means: a constant text, for any number.
 */
const char *bn_error_message(int32_t status);

/*
 What the last call on this thread that was refused expected and got; empty before the first one. It is overwritten by the
 next refusal on this thread.
 */
const char *bn_last_error(void);

/*
 The version of the library, such as "0.1.0".
 */
const char *bn_version(void);

/*
 The version of the binary interface of the library, to be compared with BN_ABI_VERSION.
 */
uint32_t bn_abi_version(void);

/*
 Makes a plan for tensors of one shape. `dtype` is a bn_dtype, `layout` a bn_layout; `spatial` holds `spatial_len` spatial
 sizes, such as height and width; NC has none, NULL and 0. `eps` is added to the variance; 0 is allowed.

 On refusal `*plan` is NULL.
 */
bn_status bn_plan_new(int32_t dtype,
                      int32_t layout,
                      size_t batch,
                      size_t channels,
                      const size_t *spatial,
                      size_t spatial_len,
                      double eps,
                      struct bn_plan **plan);

/*
 Makes a plan with the options of another for another number of samples, such as the last, smaller batch.

 On refusal `*other` is NULL.
 */
bn_status bn_plan_with_batch(const struct bn_plan *plan, size_t batch, struct bn_plan **other);

/*
 Frees a plan; NULL is left alone.
 */
void bn_plan_free(struct bn_plan *plan);

/*
 Sets the number that is added to the variance.
 */
bn_status bn_plan_set_eps(struct bn_plan *plan, double eps);

/*
 Sets the threads that a pass is shared among: 0 to choose by the size of the tensor, 1 for the calling thread alone, more
 for so many threads of the pool. It changes the speed and no bit of the results.
 */
bn_status bn_plan_set_threads(struct bn_plan *plan,
                              size_t threads);

/*
 Sets the SIMD instructions, a bn_tier. It changes the speed and no bit of the results.
 */
bn_status bn_plan_set_tier(struct bn_plan *plan, int32_t tier);

/*
 Sets whether backward passes add to dgamma and dbeta rather than overwriting them. dx is overwritten either way.
 */
bn_status bn_plan_set_accumulation(struct bn_plan *plan,
                                   bool accumulates);

/*
 Sets whether backward passes are given the output in the place of the input, which a forward pass in place overwrote. The
 activation must then be none or a leaky ReLU with a slope above 0, and no gamma close to zero.
 */
bn_status bn_plan_set_backward_from_output(struct bn_plan *plan,
                                           bool from_output);

/*
 Sets what is applied to the normalized values, a bn_activation, in forward passes, and counted in by backward passes. `slope`
 is that of a leaky ReLU, and left alone for the others.
 */
bn_status bn_plan_set_activation(struct bn_plan *plan,
                                 int32_t activation,
                                 double slope);

/*
 The number of elements of a tensor of the plan, and 0 for NULL.
 */
size_t bn_plan_len(const struct bn_plan *plan);

/*
 The number of channels, which is that of gamma, beta, mean and var; 0 for NULL.
 */
size_t bn_plan_channels(const struct bn_plan *plan);

/*
 Bytes of scratch that one call uses at most, and 0 for NULL. The first call allocates them, or `bn_plan_reserve`; the
 plan keeps them.
 */
size_t bn_plan_scratch(const struct bn_plan *plan);

/*
 Allocates scratch for `calls` calls at the same time, so that not even the first ones allocate; more than 1024 count as 1024.
 */
bn_status bn_plan_reserve(const struct bn_plan *plan,
                          size_t calls);

/*
 Takes the statistics of the population as constants, to train with them frozen: then `bn_normalize` is the forward pass,
 and backward passes hold mean and variance constant.
 */
bn_status bn_freeze(const struct bn_plan *plan,
                    const void *mean,
                    size_t mean_len,
                    const void *var,
                    size_t var_len,
                    struct bn_saved *saved);

/*
 Makes room for the statistics of batches with the channels and the dtype of a plan. It serves all such plans, and batch after
 batch.
 */
bn_status bn_saved_new(const struct bn_plan *plan,
                       struct bn_saved **saved);

/*
 Frees statistics; NULL is left alone.
 */
void bn_saved_free(struct bn_saved *saved);

/*
 The number of values per channel that were counted: 0 before the first batch, for frozen statistics, and for NULL.
 */
uint64_t bn_saved_count(const struct bn_saved *saved);

/*
 The number of channels, and 0 for NULL.
 */
size_t bn_saved_channels(const struct bn_saved *saved);

/*
 Copies one statistic (a bn_statistic) to `to`, one value per channel.
 */
bn_status bn_saved_read(const struct bn_saved *saved, int32_t statistic, void *to, size_t to_len);

/*
 Takes statistics that were kept elsewhere: mean and 1 / sqrt(var + eps) of `count` values per channel. What the mean had
 beyond its rounded value is lost.
 */
bn_status bn_saved_set(const struct bn_plan *plan,
                       struct bn_saved *saved,
                       uint64_t count,
                       const void *mean,
                       size_t mean_len,
                       const void *inv_std,
                       size_t inv_std_len);

/*
 Moves running statistics towards those of a batch: `running = keep * running + take * batch`.

 `momentum` is a bn_momentum and says what `weight` is the weight of; `variance` is a bn_variance. `batches` is the number
 of batches that entered the running statistics before this one; only a cumulative average asks for it. `mean` and `var` are
 the caller's, one value per channel, and are usually begun with 0 and 1.
 */
bn_status bn_running_update(const struct bn_saved *saved,
                            int32_t momentum,
                            double weight,
                            int32_t variance,
                            uint64_t batches,
                            void *mean,
                            size_t mean_len,
                            void *var,
                            size_t var_len);

/*
 Training forward pass: `y = act(gamma * (x - mean) * inv_std + beta)` with the mean and the biased variance of the batch,
 which go to `saved`. gamma and beta are optional: ones and zeros. `y` may be `x`.
 */
bn_status bn_forward_train(const struct bn_plan *plan,
                           const void *x,
                           size_t x_len,
                           const void *gamma,
                           size_t gamma_len,
                           const void *beta,
                           size_t beta_len,
                           void *y,
                           size_t y_len,
                           struct bn_saved *saved);

/*
 Inference: `y = act(gamma * (x - mean) / sqrt(var + eps) + beta)` with the mean and the variance of the population. gamma and
 beta are optional. `y` may be `x`.
 */
bn_status bn_forward_infer(const struct bn_plan *plan,
                           const void *x,
                           size_t x_len,
                           const void *gamma,
                           size_t gamma_len,
                           const void *beta,
                           size_t beta_len,
                           const void *mean,
                           size_t mean_len,
                           const void *var,
                           size_t var_len,
                           void *y,
                           size_t y_len);

/*
 Backward pass. With m values per channel and `xhat = (x - mean) * inv_std`, `dbeta = sum(dy)`, `dgamma = sum(dy * xhat)` and
 `dx = gamma * inv_std * (dy - dbeta/m - xhat * dgamma/m)`.

 `x`, gamma, beta and `saved` are those of the forward pass; beta counts with an activation, and backward from the output.
 Each gradient is optional: NULL if it is not wanted. `dx` may be `dy`.
 */
bn_status bn_backward(const struct bn_plan *plan,
                      const void *x,
                      size_t x_len,
                      const void *dy,
                      size_t dy_len,
                      const struct bn_saved *saved,
                      const void *gamma,
                      size_t gamma_len,
                      const void *beta,
                      size_t beta_len,
                      void *dx,
                      size_t dx_len,
                      void *dgamma,
                      size_t dgamma_len,
                      void *dbeta,
                      size_t dbeta_len);

/*
 The first half of a training forward pass: the moments of each channel of this shard.
 */
bn_status bn_moments_of(const struct bn_plan *plan,
                        const void *x,
                        size_t x_len,
                        struct bn_moments *moments,
                        size_t moments_len);

/*
 Adds the values behind `from` to those behind `into`, channel by channel, by Chan's form of Welford's update.
 */
bn_status bn_moments_merge(struct bn_moments *into,
                           size_t into_len,
                           const struct bn_moments *from,
                           size_t from_len);

/*
 Turns moments, of this shard or of several merged, into the statistics to normalize with.
 */
bn_status bn_finish(const struct bn_plan *plan,
                    const struct bn_moments *moments,
                    size_t moments_len,
                    struct bn_saved *saved);

/*
 The second half of a training forward pass: `y` with the statistics in `saved`. gamma and beta are optional. `y` may be `x`.
 */
bn_status bn_normalize(const struct bn_plan *plan,
                       const void *x,
                       size_t x_len,
                       const void *gamma,
                       size_t gamma_len,
                       const void *beta,
                       size_t beta_len,
                       const struct bn_saved *saved,
                       void *y,
                       size_t y_len);

/*
 The first half of a backward pass: the sums of each channel of this shard.
 */
bn_status bn_gradient_sums_of(const struct bn_plan *plan,
                              const void *x,
                              size_t x_len,
                              const void *dy,
                              size_t dy_len,
                              const struct bn_saved *saved,
                              const void *gamma,
                              size_t gamma_len,
                              const void *beta,
                              size_t beta_len,
                              struct bn_gradient_sums *sums,
                              size_t sums_len);

/*
 Adds the sums of `from` to those of `into`, channel by channel.
 */
bn_status bn_gradient_sums_merge(struct bn_gradient_sums *into,
                                 size_t into_len,
                                 const struct bn_gradient_sums *from,
                                 size_t from_len);

/*
 The second half of a backward pass: `dx` of this shard, from the sums of all shards. `dx` may be `dy`.
 */
bn_status bn_input_gradient(const struct bn_plan *plan,
                            const void *x,
                            size_t x_len,
                            const void *dy,
                            size_t dy_len,
                            const struct bn_saved *saved,
                            const void *gamma,
                            size_t gamma_len,
                            const void *beta,
                            size_t beta_len,
                            const struct bn_gradient_sums *sums,
                            size_t sums_len,
                            void *dx,
                            size_t dx_len);

/*
 The gradients of gamma and beta from sums; each is optional.
 */
bn_status bn_parameter_gradients(const struct bn_plan *plan,
                                 const struct bn_saved *saved,
                                 const struct bn_gradient_sums *sums,
                                 size_t sums_len,
                                 void *dgamma,
                                 size_t dgamma_len,
                                 void *dbeta,
                                 size_t dbeta_len);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* BATCHNORM_H */
