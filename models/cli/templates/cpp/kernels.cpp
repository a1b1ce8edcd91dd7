// A kernel plugin to start from: kernels on the public layout cpu/t2x32, which bitnet-burn packs itself. So they share the
// weights with the built-in kernels of this layout: a kernel that is faster for prompts alone computes the prompts, and the
// built-in one the rest.
//
// The layout: 32 rows lie side by side. In each step of 128 bytes, every row has a lane of 4 bytes with 16 weights: byte i
// holds weights i, 4 + i, 8 + i and 12 + i of the step in bits 1..0, 3..2, 5..4 and 7..6. So four weights at the same bits of
// a lane meet four activations that follow each other.
//
// Codes are u = c + 1 in {0, 1, 2}, unsigned as vpmaddubsw wants one side to be. The host gives the sum of each row of
// activations, and sum(q * c) = sum(q * u) - sum(q).
#include "bitnet_plugin.h"

#include <algorithm>
#include <array>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

constexpr uint64_t ROWS = 32, STEP = 16, STEP_BYTES = 128;
// Rows of activations that share the unpacking of the weights, at most.
constexpr uint64_t MOST = 4;

using Activations = std::array<const int8_t *, MOST>;
using Sums = std::array<std::array<int32_t, ROWS>, MOST>;

// Sums of codes times activations: a block of 32 rows, and M rows of activations.
using Multiply = void (*)(const uint8_t *block, uint64_t steps, const Activations &x, Sums &sums);

template <uint64_t M> void portable(const uint8_t *block, uint64_t steps, const Activations &x, Sums &sums) {
    sums = {};
    for (uint64_t j = 0; j < steps; j++)
        for (uint64_t m = 0; m < M; m++)
            for (uint64_t r = 0; r < ROWS; r++) {
                const uint8_t *lane = block + j * STEP_BYTES + r * 4;
                int32_t sum = 0;
                for (int t = 0; t < 4; t++)
                    for (int i = 0; i < 4; i++) sum += (lane[i] >> (2 * t) & 3) * x[m][j * STEP + 4 * t + i];
                sums[m][r] += sum;
            }
}

#if defined(__x86_64__)
template <uint64_t M>
__attribute__((target("avx2"))) void avx2(const uint8_t *block, uint64_t steps, const Activations &x, Sums &sums) {
    // Until 16-bit sums must be widened: a step adds four pairs of at most 2 * 128 to each, and 15 times that is in range.
    constexpr uint64_t FLUSH = 15;
    const __m256i mask = _mm256_set1_epi8(3), ones = _mm256_set1_epi16(1);
    for (uint64_t rows = 0; rows < ROWS; rows += 8) {
        __m256i wide[M];
        for (uint64_t m = 0; m < M; m++) wide[m] = _mm256_setzero_si256();
        for (uint64_t from = 0; from < steps; from += FLUSH) {
            __m256i narrow[M];
            for (uint64_t m = 0; m < M; m++) narrow[m] = _mm256_setzero_si256();
            for (uint64_t j = from; j < std::min(steps, from + FLUSH); j++) {
                const uint8_t *lanes = block + j * STEP_BYTES + rows * 4;
                __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(lanes));
                for (int t = 0; t < 4; t++) {
                    const __m256i low = _mm256_and_si256(codes, mask);
                    for (uint64_t m = 0; m < M; m++) {
                        int32_t four;
                        std::memcpy(&four, x[m] + j * STEP + 4 * t, 4);
                        narrow[m] = _mm256_add_epi16(narrow[m], _mm256_maddubs_epi16(low, _mm256_set1_epi32(four)));
                    }
                    codes = _mm256_srli_epi16(codes, 2);
                }
            }
            for (uint64_t m = 0; m < M; m++)
                wide[m] = _mm256_add_epi32(wide[m], _mm256_madd_epi16(narrow[m], ones));
        }
        for (uint64_t m = 0; m < M; m++)
            _mm256_storeu_si256(reinterpret_cast<__m256i *>(sums[m].data() + rows), wide[m]);
    }
}
#endif

// The loop over a tile. Activations are zero up to whole steps and beyond, so what the layout has behind K is harmless.
template <Multiply one, Multiply four>
bitnet_status_t run(const bitnet_weights_t *w, const bitnet_activations_t *x, const uint8_t *, const bitnet_output_t *y,
                    const bitnet_tile_t *tile, const bitnet_message_t *) {
    const uint64_t steps = (w->k + STEP - 1) / STEP;
    for (uint64_t n = tile->n0; n < tile->n1; n += ROWS)
        for (uint64_t m = tile->m0; m < tile->m1; m += MOST) {
            const uint64_t rows = std::min(ROWS, tile->n1 - n), count = std::min(MOST, tile->m1 - m);
            Activations q;
            // Rows that are not there are computed as the last one, and not stored.
            for (uint64_t i = 0; i < MOST; i++) q[i] = x->q + (m + std::min(i, count - 1)) * x->stride;
            Sums sums;
            (count == 1 ? one : four)(w->data + n / ROWS * steps * STEP_BYTES, steps, q, sums);
            for (uint64_t i = 0; i < count; i++) {
                // Two products, in this order.
                const float scale = w->scale * x->scale[m + i];
                float *out = y->y + (m + i) * y->stride + n;
                for (uint64_t r = 0; r < rows; r++) out[r] = static_cast<float>(sums[i][r] - x->sum[m + i]) * scale;
            }
        }
    return BITNET_OK;
}

int32_t supports(const bitnet_signature_t *s) { return s->operation == BITNET_OPERATION_TERNARY_MATMUL; }

constexpr bitnet_kernel_t kernel(const char *name, const char *features, decltype(bitnet_kernel_t::run) run) {
    bitnet_kernel_t kernel = {};
    kernel.struct_size = sizeof kernel;
    kernel.name = name;
    kernel.layout = BITNET_LAYOUT_T2X32;
    kernel.features = features;
    kernel.operation = BITNET_OPERATION_TERNARY_MATMUL;
    kernel.target = BITNET_TARGET_CPU;
    kernel.weight_alignment = 64;
    kernel.row_granule = ROWS;
    kernel.supports = supports;
    kernel.run = run;
    return kernel;
}

constexpr bitnet_kernel_t for_any = kernel("portable", nullptr, run<portable<1>, portable<4>>);
#if defined(__x86_64__)
constexpr bitnet_kernel_t for_avx2 = kernel("avx2", "avx2", run<avx2<1>, avx2<4>>);
constexpr const bitnet_kernel_t *kernels[] = {&for_avx2, &for_any};
#else
constexpr const bitnet_kernel_t *kernels[] = {&for_any};
#endif

constexpr bitnet_plugin_t plugin = {
    sizeof(bitnet_plugin_t), BITNET_ABI_MAJOR, BITNET_ABI_MINOR, "example-cpp", "0.1.0", kernels, std::size(kernels),
};

} // namespace

extern "C" const bitnet_plugin_t *bitnet_plugin(void) { return &plugin; }
