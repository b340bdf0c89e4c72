// The flow-RL ops on a CPU: loops over the mathematics of flow.h.
//
// A row is cut into tiles that fit the first-level cache; a tile's mean is made once and serves its
// G branches. Partial sums are kept by (row, branch, tile) and added in the order of the tiles, so
// the bits of a row depend neither on the threads nor on the rows beside it.
#include <algorithm>
#include <memory>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "tiles.h"

namespace g2rpo::cpu {
namespace {

constexpr int64_t parallel_from = 32768;  // elements; below, waking threads costs more than it gains
constexpr int64_t small_scratch = 1024;   // floats kept on the stack

int64_t tiles_of(int64_t count) { return (count + tile_size - 1) / tile_size; }

// One tile of one row: what every loop over (row, tile) needs.
struct Tile {
  int64_t row, index, first, size, offset;  // offset: of its first element in a [P, N] array
};

// body(Tile) for every tile of every row, on all threads when there is work for them.
template <class Body>
void for_tiles(int64_t rows, int64_t count, [[maybe_unused]] int64_t work, const Body& body,
               int64_t size = tile_size) {
  const int64_t tiles = (count + size - 1) / size;
#pragma omp parallel for schedule(static) if (work >= parallel_from)
  for (int64_t i = 0; i < rows * tiles; ++i) {
    const int64_t row = i / tiles, index = i % tiles, first = index * size;
    body(Tile{row, index, first, std::min(size, count - first), row * count + first});
  }
}

int64_t threads() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 1;
#endif
}

struct Buffers {
  alignas(64) float velocity[tile_size], latents[tile_size], mean[tile_size], other[tile_size];
};

void read_mean(const Step& step, const Tile& tile, Buffers& buffers, float* mean) {
  mean_tile(coefficients_of(step.table, step.table_stride, tile.row),
            read(step.latents, tile.offset, tile.size, buffers.latents),
            read(step.velocity, tile.offset, tile.size, buffers.velocity), mean, tile.size);
}

int64_t work_of(const Step& step) { return step.rows * (step.branches + 1) * step.count; }

// Partial sums by (row, branch, tile); on the stack while they are few.
class Partial {
 public:
  Partial(int64_t rows, int64_t branches, int64_t count)
      : branches_(branches), tiles_(tiles_of(count)) {
    const int64_t size = rows * branches * tiles_;
    if (size > small_scratch) heap_.reset(new float[static_cast<size_t>(size)]);
    values_ = heap_ ? heap_.get() : few_;
  }
  float& at(int64_t row, int64_t branch, int64_t tile) {
    return values_[(row * branches_ + branch) * tiles_ + tile];
  }
  float sum(int64_t row, int64_t branch) const {
    const float* from = values_ + (row * branches_ + branch) * tiles_;
    float total = 0;
    for (int64_t i = 0; i < tiles_; ++i) total += from[i];
    return total;
  }

 private:
  int64_t branches_, tiles_;
  float few_[small_scratch];
  std::unique_ptr<float[]> heap_;
  float* values_;
};

void finish_log_probs(const Step& step, const Partial& partial, float* log_prob) {
  for (int64_t row = 0; row < step.rows; ++row) {
    const Coefficients k = coefficients_of(step.table, step.table_stride, row);
    for (int64_t g = 0; g < step.branches; ++g)
      log_prob[row * step.branches + g] = log_prob_of(k, partial.sum(row, g), step.count);
  }
}

int64_t branch_offset(const Step& step, const Tile& tile, int64_t g) {
  return (tile.row * step.branches + g) * step.count + tile.first;
}

// Partial sums of (x_next - mean)^2, and of (v - v_other)^2 behind the branches' own.
//
// x_next comes from memory, and memory is fastest along long runs: a thread makes the mean of several
// tiles and then reads a branch through all of them. The sums are still those of single tiles.
void square_sums(const Step& step, Array x_next, const Array* others, int64_t other_count,
                 Partial& partial) {
  constexpr int64_t longest = 8;  // tiles; one alone where a long run would leave threads idle
  const int64_t all = step.rows * tiles_of(step.count);
  const int64_t run = all >= 2 * longest * threads() ? longest : 1;
  const auto sum_span = [&](const Tile& span) {
    alignas(64) float mean[longest * tile_size];
    Buffers buffers;
    const auto for_each = [&](const auto& body) {  // body(tile of the row, its offset in the span)
      for (int64_t at = 0; at < span.size; at += tile_size) {
        const int64_t first = span.first + at;
        body(Tile{span.row, first / tile_size, first, std::min(tile_size, span.size - at),
                  span.offset + at}, at);
      }
    };
    for_each([&](const Tile& tile, int64_t at) { read_mean(step, tile, buffers, mean + at); });
    for (int64_t g = 0; g < step.branches; ++g) {
      for_each([&](const Tile& tile, int64_t at) {
        const float* x = read(x_next, branch_offset(step, tile, g), tile.size, buffers.other);
        partial.at(tile.row, g, tile.index) =
            square_sum_tile(x, mean + at, x + 2 * tile_size, tile.size);
      });
    }
    for (int64_t i = 0; i < other_count; ++i) {
      for_each([&](const Tile& tile, int64_t) {
        const float* v = read(step.velocity, tile.offset, tile.size, buffers.velocity);
        const float* other = read(others[i], tile.offset, tile.size, buffers.other);
        partial.at(tile.row, step.branches + i, tile.index) =
            square_sum_tile(v, other, v, tile.size);
      });
    }
  };
  for_tiles(step.rows, step.count, work_of(step), sum_span, run * tile_size);
}

float load(Array array, int64_t i) {
  float buffer;
  return *read(array, i, 1, &buffer);
}

// Adds weight * sum_j (r - mean) / (std + eps) of one reward model to total[G].
void add_normalised(const GroupAdvantages& a, int64_t model, int64_t group, int64_t position,
                    double weight, double* group_rewards, double* sums, double* total) {
  const int64_t samples = a.groups * a.group_size;
  std::fill(sums, sums + a.group_size, 0.0);
  for (int64_t j = 0; j < a.granularities; ++j) {
    const int64_t first = (model * a.granularities + j) * samples + group * a.group_size;
    bool finite = true;
    double low = INFINITY, high = -INFINITY, mean = 0;
    for (int64_t g = 0; g < a.group_size; ++g) {
      const double r = load(a.rewards, (first + g) * a.positions + position);
      group_rewards[g] = r;
      finite = finite && std::isfinite(r);
      low = std::min(low, r), high = std::max(high, r);
      mean += r;
    }
    if (!finite || !(high > low)) continue;  // a failed judge, or nothing to tell apart
    mean /= static_cast<double>(a.group_size);
    double squares = 0;
    for (int64_t g = 0; g < a.group_size; ++g)
      squares += (group_rewards[g] - mean) * (group_rewards[g] - mean);
    const double spread = std::sqrt(squares / static_cast<double>(a.group_size - 1)) + a.eps;
    for (int64_t g = 0; g < a.group_size; ++g) sums[g] += (group_rewards[g] - mean) / spread;
  }
  for (int64_t g = 0; g < a.group_size; ++g) total[g] += weight * sums[g];
}

}  // namespace

// ---- The ops ----

void step_mean(const StepMean& a) {
  for_tiles(a.step.rows, a.step.count, 2 * a.step.rows * a.step.count, [&](const Tile& tile) {
    Buffers buffers;
    read_mean(a.step, tile, buffers, a.mean + tile.offset);
  });
}

void ode_step(const OdeStep& a) {
  for_tiles(a.rows, a.count, 2 * a.rows * a.count, [&](const Tile& tile) {
    Buffers buffers;
    const float delta = a.sigma_next[tile.row * a.sigma_next_stride] -
                        a.sigma[tile.row * a.sigma_stride];
    euler_tile(delta, read(a.latents, tile.offset, tile.size, buffers.latents),
               read(a.velocity, tile.offset, tile.size, buffers.velocity), a.x_next + tile.offset,
               tile.size);
  });
}

void normal(const Normal& a) {
  for_tiles(a.seed_count, a.count, a.seed_count * a.count, [&](const Tile& tile) {
    normal_tile(static_cast<uint64_t>(a.seeds[tile.row]), tile.first, a.noise + tile.offset,
                tile.size);
  });
}

void sde_step(const SdeStep& a) {
  const Step& step = a.step;
  Partial partial(step.rows, step.branches, step.count);
  for_tiles(step.rows, step.count, work_of(step), [&](const Tile& tile) {
    Buffers buffers;
    read_mean(step, tile, buffers, buffers.mean);
    const Coefficients k = coefficients_of(step.table, step.table_stride, tile.row);
    for (int64_t g = 0; g < step.branches; ++g) {
      const int64_t offset = branch_offset(step, tile, g);
      const float* eps = buffers.other;
      if (a.seeds) {
        const int64_t seed = a.seeds[tile.row * step.branches + g];
        normal_tile(static_cast<uint64_t>(seed), tile.first, buffers.other, tile.size);
      } else {
        eps = read(a.noise, offset, tile.size, buffers.other);
      }
      float* x_next = a.x_next + offset;
      branch_tile(k, buffers.mean, eps, x_next, tile.size);
      partial.at(tile.row, g, tile.index) = square_sum_tile(x_next, buffers.mean, x_next, tile.size);
    }
  });
  finish_log_probs(step, partial, a.log_prob);
}

void branch_log_prob(const BranchLogProb& a) {
  Partial partial(a.step.rows, a.step.branches, a.step.count);
  square_sums(a.step, a.x_next, nullptr, 0, partial);
  finish_log_probs(a.step, partial, a.log_prob);
}

void policy_loss(const PolicyLoss& a) {
  const Step& step = a.step;
  Array others[2];
  int64_t other_count = 0;
  const int64_t reference = a.reference_velocity.data ? step.branches + other_count : -1;
  if (a.reference_velocity.data) others[other_count++] = a.reference_velocity;
  const int64_t old = a.old_velocity.data ? step.branches + other_count : -1;
  if (a.old_velocity.data) others[other_count++] = a.old_velocity;
  Partial partial(step.rows, step.branches + other_count, step.count);
  square_sums(step, a.x_next, others, other_count, partial);
  finish_log_probs(step, partial, a.log_prob);

  const float branches = static_cast<float>(step.rows * step.branches);
  double loss = 0, ratio = 0, outside = 0, approx_kl = 0, kl = 0;
  float ratio_max = -INFINITY;
  for (int64_t row = 0; row < step.rows; ++row) {
    const Coefficients k = coefficients_of(step.table, step.table_stride, row);
    const float gap = old < 0 ? 0 : mean_gap_of(k, partial.sum(row, old), step.count);
    if (reference >= 0) kl += mean_gap_of(k, partial.sum(row, reference), step.count);
    for (int64_t i = row * step.branches; i < (row + 1) * step.branches; ++i) {
      float log_ratio = a.log_prob[i] - a.old_log_prob[i];
      if (old >= 0) log_ratio = (log_ratio + gap) * k.s;
      const BranchLoss b = branch_loss(log_ratio, a.advantages[i], old < 0 ? 1 : k.s, a.options);
      a.grad_log_prob[i] = b.grad_log_prob / branches;
      loss += b.loss, ratio += b.ratio, outside += b.outside;
      approx_kl += b.ratio - 1.0f - b.log_ratio;
      ratio_max = max_or_nan(ratio_max, b.ratio);
    }
  }
  const double mean_kl = kl / static_cast<double>(step.rows);
  *a.loss = static_cast<float>(loss / branches + (reference < 0 ? 0 : a.options.kl_weight * mean_kl));
  a.statistics[0] = static_cast<float>(ratio / branches);
  a.statistics[1] = ratio_max;
  a.statistics[2] = static_cast<float>(outside / branches);
  a.statistics[3] = static_cast<float>(approx_kl / branches);
  a.statistics[4] = static_cast<float>(mean_kl);
}

void log_prob_backward(const LogProbBackward& a) {
  const Step& step = a.step;
  for_tiles(step.rows, step.count, work_of(step), [&](const Tile& tile) {
    Buffers buffers;
    alignas(64) float total[tile_size];
    std::fill(total, total + tile.size, 0.0f);
    read_mean(step, tile, buffers, buffers.mean);
    float sum_of_grads = 0;
    for (int64_t g = 0; g < step.branches; ++g) {
      const float grad = a.grad_log_prob[tile.row * step.branches + g];
      sum_of_grads += grad;
      const float* x = read(a.x_next, branch_offset(step, tile, g), tile.size, buffers.other);
      add_gap_tile(grad, x, buffers.mean, x + step.count, total, tile.size);
    }
    const GradientFactors factors =
        gradient_factors(coefficients_of(step.table, step.table_stride, tile.row), step.count,
                         a.scale ? *a.scale : 1.0f, sum_of_grads, a.kl_weight, step.rows);
    const float* v = read(step.velocity, tile.offset, tile.size, buffers.velocity);
    if (a.old_velocity.data) {
      const float* other = read(a.old_velocity, tile.offset, tile.size, buffers.other);
      add_gap_tile(factors.old, v, other, v, total, tile.size);
    }
    if (a.reference_velocity.data) {
      const float* other = read(a.reference_velocity, tile.offset, tile.size, buffers.other);
      add_gap_tile(factors.reference, v, other, v, total, tile.size);
    }
    scale_tile(factors.whole, total, tile.size);
    write(total, tile.size, a.grad_velocity, step.velocity.dtype, tile.offset);
  });
}

void group_advantages(const GroupAdvantages& a) {
  const int64_t size = a.group_size, columns = a.groups * a.positions;
  [[maybe_unused]] const int64_t work = a.models * a.granularities * columns * size * 8;
#pragma omp parallel if (work >= parallel_from)
  {
    std::unique_ptr<double[]> buffer(new double[static_cast<size_t>(3 * size)]);
    double *rewards = buffer.get(), *sums = rewards + size, *total = sums + size;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < columns; ++i) {
      const int64_t group = i / a.positions, position = i % a.positions;
      std::fill(total, total + size, 0.0);
      for (int64_t r = 0; r < a.models; ++r)
        add_normalised(a, r, group, position, a.weights ? a.weights[r] : 1.0, rewards, sums, total);
      for (int64_t g = 0; g < size; ++g)
        a.advantages[(group * size + g) * a.positions + position] = static_cast<float>(total[g]);
    }
  }
}

const char* variant() {
#if G2RPO_HAS_CLONES
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return "avx512";
  if (__builtin_cpu_supports("x86-64-v3")) return "avx2";
#endif
  return "default";
}

}  // namespace g2rpo::cpu
