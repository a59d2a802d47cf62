/* Products of a few rows by the instruction that adds products of pairs of bfloat16 numbers to sums in float32, 32 at a
   time. So eight rows take little longer than it takes to read the matrix.

   By rows, squares of four rows of the matrix and four inputs are multiplied: what is loaded is used four times. By
   columns, eight columns are added to the sums of all inputs, which stay in the processor's cache. */

enum { LANES = 32 };          /* numbers of a vector */
enum { GROUP = 8 };           /* columns of a group; SIDE rows are those of a square */
/* Sums of an input that are computed at once, and from one input's to the next's: with a power of two in bytes between
   them, all inputs' would share a few lines of the cache. */
enum { BLOCK = 640, APART = 656 };

#ifdef __AVX512F__

#include <immintrin.h>

#define PAIRS __attribute__((target("avx512bf16")))
#define PAIRS_INLINE PAIRS INLINE

/* Lines of rows that come next. The processor is asked for them, one behind the other, while it computes. */
typedef struct {
    const char *row, *line;
    ptrdiff_t stride, bytes, rows;
} Lines;

INLINE Lines lines_of(const char *row, ptrdiff_t stride, ptrdiff_t bytes, ptrdiff_t rows)
{
    return (Lines){row, row, stride, bytes, rows};
}

INLINE void ask(Lines *next, int n_lines)
{
    for (; n_lines > 0 && next->rows > 0; n_lines--) {
        __builtin_prefetch(next->line, 0, 2); /* into the cache of the second level: the first is full of inputs */
        next->line += LINE;
        if (next->line - next->row >= next->bytes) {
            next->line = next->row += next->stride;
            next->rows--;
        }
    }
}

PAIRS_INLINE __mmask32 first(ptrdiff_t n)
{
    return n >= LANES ? 0xffffffff : ((__mmask32)1 << n) - 1;
}

PAIRS_INLINE __m512bh numbers_at(const void *from, __mmask32 mask)
{
    return (__m512bh)_mm512_maskz_loadu_epi16(mask, from);
}

/* Sixteen numbers in bfloat16, widened. */
PAIRS_INLINE __m512 widened_at(const uint16_t *from, __mmask16 mask)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from)), 16));
}

/* Numbers in bfloat16, as which those in INT8 are exact. */
PAIRS_INLINE __m512bh brought_at(const char *from, __mmask32 mask, const int element)
{
    if (element == BFLOAT16)
        return numbers_at(from, mask);
    __m256i bytes = _mm256_maskz_loadu_epi8(mask, from);
    __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(bytes)));
    __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(bytes, 1)));
    return _mm512_cvtne2ps_pbh(high, low);
}

/* Copies a row as bfloat16, and fills it up with zeros to whole vectors. */
PAIRS_INLINE void bring(const char *row, uint16_t *to, ptrdiff_t k, const int element)
{
    for (ptrdiff_t j = 0; j < k; j += LANES)
        _mm512_storeu_si512(to + j, (__m512i)brought_at(row + j * element, first(k - j), element));
}

/* The sum of each of sixteen vectors, in their order. */
PAIRS_INLINE __m512 totals(__m512 vectors[SIDE][SIDE])
{
    __m512 quarters[SIDE];
    for (int r = 0; r < SIDE; r++) {
        __m512d halves[2];
        for (int half = 0; half < 2; half++) {
            __m512 even = vectors[r][2 * half], odd = vectors[r][2 * half + 1];
            halves[half] = _mm512_castps_pd(_mm512_unpacklo_ps(even, odd) + _mm512_unpackhi_ps(even, odd));
        }
        quarters[r] = _mm512_castpd_ps(_mm512_unpacklo_pd(halves[0], halves[1])) +
                      _mm512_castpd_ps(_mm512_unpackhi_pd(halves[0], halves[1]));
    }
    __m512 front = _mm512_shuffle_f32x4(quarters[0], quarters[1], 0x44) +
                   _mm512_shuffle_f32x4(quarters[0], quarters[1], 0xee);
    __m512 back = _mm512_shuffle_f32x4(quarters[2], quarters[3], 0x44) +
                  _mm512_shuffle_f32x4(quarters[2], quarters[3], 0xee);
    return _mm512_shuffle_f32x4(front, back, 0x88) + _mm512_shuffle_f32x4(front, back, 0xdd);
}

/* Products of up to four inputs with four rows of whole vectors: lane SIDE * r + i is that of input r and row i. */
PAIRS_INLINE __m512 square(const uint16_t *brought, const uint16_t *inputs, const int rows, ptrdiff_t k, Lines *next)
{
    const ptrdiff_t filled = (k + LANES - 1) / LANES * LANES;
    __m512 sums[SIDE][SIDE] = {0};
    for (ptrdiff_t j = 0; j < k; j += LANES) {
        ask(next, SIDE);
        __m512bh own[SIDE];
        for (int i = 0; i < SIDE; i++)
            own[i] = numbers_at(brought + i * filled + j, 0xffffffff);
        for (int r = 0; r < rows; r++) {
            __m512bh input = numbers_at(inputs + r * k + j, first(k - j));
            for (int i = 0; i < SIDE; i++)
                sums[r][i] = _mm512_dpbf16_ps(sums[r][i], input, own[i]);
        }
    }
    return totals(sums);
}

/* Up to four rows of a matrix of n rows with k elements, from row i on. */
typedef struct {
    const uint16_t *brought;
    Lines next;
    __m512 scale;
    int rows;
} Side;

PAIRS_INLINE Side side_of(const Matrix *matrix, const int element, uint16_t *room, ptrdiff_t i, ptrdiff_t n, ptrdiff_t k)
{
    const ptrdiff_t filled = (k + LANES - 1) / LANES * LANES;
    const char *own = matrix->rows + i * matrix->stride;
    const int here = n - i < SIDE ? (int)(n - i) : SIDE;
    float scales[SIDE] = {0};
    for (int side = 0; side < here; side++) {
        bring(own + side * matrix->stride, room + side * filled, k, element);
        scales[side] = scale_of(matrix, i + side, element);
    }
    const ptrdiff_t left = n - i - SIDE;
    Lines next = lines_of(own + SIDE * matrix->stride, matrix->stride, k * element, left < SIDE ? left : SIDE);
    return (Side){room, next, _mm512_broadcast_f32x4(_mm_loadu_ps(scales)), here};
}

/* The products of up to four of so many inputs with a side, as `square` has them, scaled. */
PAIRS_INLINE __m512 products(Side *side, const uint16_t *inputs, int rows, ptrdiff_t k)
{
    return side->scale * (rows == 1   ? square(side->brought, inputs, 1, k, &side->next)
                          : rows == 2 ? square(side->brought, inputs, 2, k, &side->next)
                          : rows == 3 ? square(side->brought, inputs, 3, k, &side->next)
                                      : square(side->brought, inputs, SIDE, k, &side->next));
}

INLINE int at_most_side(ptrdiff_t rows)
{
    return rows < SIDE ? (int)rows : SIDE;
}

/* outputs[r][i] = inputs[r] . matrix[i] + bias[i], of a matrix of n rows with k elements. Room for SIDE filled rows. */
PAIRS_INLINE void pairs_with(const Matrix *matrix, const int element, const uint16_t *bias, const uint16_t *inputs,
                             uint16_t *outputs, uint16_t *room, ptrdiff_t rows, ptrdiff_t n, ptrdiff_t k)
{
    for (ptrdiff_t i = 0; i < n; i += SIDE) {
        Side side = side_of(matrix, element, room, i, n, k);
        float biases[SIDE] = {0};
        for (int place = 0; bias != NULL && place < side.rows; place++)
            biases[place] = wide_one(bias[i + place]);
        const __m512 base = _mm512_broadcast_f32x4(_mm_loadu_ps(biases));
        for (ptrdiff_t r = 0; r < rows; r += SIDE) {
            const int few = at_most_side(rows - r);
            uint16_t halves[SIDE * SIDE];
            __m512 sums = products(&side, inputs + r * k, few, k) + base;
            _mm256_storeu_si256((__m256i *)halves, (__m256i)_mm512_cvtneps_pbh(sums));
            for (int row = 0; row < few; row++)
                memcpy(outputs + (r + row) * n + i, halves + SIDE * row, side.rows * sizeof *halves);
        }
    }
}

PAIRS static void pairs_by_rows(const Matrix *matrix, const uint16_t *bias, const uint16_t *inputs, uint16_t *outputs,
                                void *room, ptrdiff_t rows, ptrdiff_t n, ptrdiff_t k)
{
    if (matrix->scales == NULL)
        pairs_with(matrix, BFLOAT16, bias, inputs, outputs, room, rows, n, k);
    else
        pairs_with(matrix, INT8, bias, inputs, outputs, room, rows, n, k);
}

/* scores[r][i] = queries[r] . keys[i], of so many tokens. Room for SIDE filled rows. */
PAIRS static void pairs_of_keys(const Matrix *keys, const uint16_t *queries, float *scores, void *room, ptrdiff_t rows,
                                ptrdiff_t tokens, ptrdiff_t k)
{
    for (ptrdiff_t i = 0; i < tokens; i += SIDE) {
        Side side = keys->scales == NULL ? side_of(keys, BFLOAT16, room, i, tokens, k)
                                         : side_of(keys, INT8, room, i, tokens, k);
        for (ptrdiff_t r = 0; r < rows; r += SIDE) {
            const int few = at_most_side(rows - r);
            float sums[SIDE * SIDE];
            _mm512_storeu_ps(sums, products(&side, queries + r * k, few, k));
            for (int row = 0; row < few; row++)
                memcpy(scores + (r + row) * tokens + i, sums + SIDE * row, side.rows * sizeof *sums);
        }
    }
}

/* sums[r] += inputs[r][j] * matrix[j], of the first `here` elements of GROUP rows of which so many `exist`; those of two
   rows lie side by side in a vector, and so do two numbers of an input. Inputs lie `filled` apart. */
PAIRS_INLINE void add_group(const char *own, ptrdiff_t stride, ptrdiff_t exist, const uint16_t *inputs, ptrdiff_t filled,
                            float *sums, ptrdiff_t rows, ptrdiff_t here, Lines *next)
{
    for (ptrdiff_t i = 0; i < here; i += LANES, own += LANES * BFLOAT16, sums += LANES) {
        ask(next, GROUP);
        __m512bh low[GROUP / 2], high[GROUP / 2];
        for (int pair = 0; pair < GROUP / 2; pair++) {
            const char *even = own + 2 * pair * stride;
            __m512i left = (__m512i)numbers_at(even, 2 * pair < exist ? first(here - i) : 0);
            __m512i right = (__m512i)numbers_at(even + stride, 2 * pair + 1 < exist ? first(here - i) : 0);
            low[pair] = (__m512bh)_mm512_unpacklo_epi16(left, right);
            high[pair] = (__m512bh)_mm512_unpackhi_epi16(left, right);
        }
        for (ptrdiff_t r = 0; r < rows; r++) {
            float *there = sums + r * APART;
            __m512 front = _mm512_loadu_ps(there), back = _mm512_loadu_ps(there + WIDTH);
            for (int pair = 0; pair < GROUP / 2; pair++) {
                int32_t both;
                memcpy(&both, inputs + r * filled + 2 * pair, sizeof both);
                __m512bh input = (__m512bh)_mm512_set1_epi32(both);
                front = _mm512_dpbf16_ps(front, input, low[pair]);
                back = _mm512_dpbf16_ps(back, input, high[pair]);
            }
            _mm512_storeu_ps(there, front);
            _mm512_storeu_ps(there + WIDTH, back);
        }
    }
}

/* outputs[i] = sums[i] + bias[i], rounded, of `here` sums as `add_group` leaves them: fours of two vectors in turn. */
PAIRS_INLINE void finish(const float *sums, const uint16_t *bias, uint16_t *outputs, ptrdiff_t here)
{
    const __m512i turn = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i turns[2] = {turn, _mm512_add_epi32(turn, _mm512_set1_epi32(8))};
    for (ptrdiff_t i = 0; i < here; i += WIDTH) {
        const float *both = sums + i / LANES * LANES;
        __m512 sum = _mm512_permutex2var_ps(_mm512_loadu_ps(both), turns[i / WIDTH % 2], _mm512_loadu_ps(both + WIDTH));
        __mmask16 mask = (__mmask16)first(here - i);
        if (bias != NULL)
            sum += widened_at(bias + i, mask);
        _mm256_mask_storeu_epi16(outputs + i, mask, (__m256i)_mm512_cvtneps_pbh(sum));
    }
}

/* outputs[r] = sum over j of inputs[r][j] * matrix[j], plus bias, of a matrix of k rows with n elements. Room for the
   inputs, filled up to whole groups, behind rows * APART sums. */
PAIRS static void pairs_by_columns(const Matrix *matrix, const uint16_t *bias, const uint16_t *inputs,
                                   uint16_t *outputs, void *room, ptrdiff_t rows, ptrdiff_t n, ptrdiff_t k)
{
    const ptrdiff_t filled = (k + GROUP - 1) / GROUP * GROUP;
    float *sums = room;
    uint16_t *whole = (uint16_t *)(sums + rows * APART);
    memset(whole, 0, rows * filled * sizeof *whole);
    for (ptrdiff_t r = 0; r < rows; r++)
        memcpy(whole + r * filled, inputs + r * k, k * sizeof *whole);
    for (ptrdiff_t block = 0, here; block < n; block += here) {
        here = n - block < BLOCK ? n - block : BLOCK;
        memset(sums, 0, rows * APART * sizeof *sums);
        for (ptrdiff_t j = 0; j < k; j += GROUP) {
            const char *own = matrix->rows + j * matrix->stride + block * BFLOAT16;
            Lines next = lines_of(own + GROUP * matrix->stride, matrix->stride, here * BFLOAT16, k - j - GROUP);
            add_group(own, matrix->stride, k - j, whole + j, filled, sums, rows, here, &next);
        }
        for (ptrdiff_t r = 0; r < rows; r++)
            finish(sums + r * APART, bias == NULL ? NULL : bias + block, outputs + r * n + block, here);
    }
}

static int has_pairs(void)
{
    return __builtin_cpu_supports("avx512bf16");
}

INLINE size_t pairs_room(ptrdiff_t rows, ptrdiff_t k)
{
    return rows * APART * sizeof(float) + ((rows + SIDE) * (k + LANES)) * sizeof(uint16_t);
}

#endif
