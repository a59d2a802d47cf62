/* Products of a few rows with a matrix, and attention of one token, summed in float32: one pass over matrices, keys and
   values in bfloat16 or INT8, as they lie in memory.

   A row of the matrix, or a column where it is stored by columns, is read once for all of up to four input rows, as one
   stream with a prefetch ahead of it: several that lie side by side were slower (`one_row.h` reads some that lie far
   apart). */

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef float Floats __attribute__((vector_size(64)));
typedef float Eight __attribute__((vector_size(32)));
typedef float Four __attribute__((vector_size(16)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef int32_t Integers __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));
typedef int16_t Shorts __attribute__((vector_size(32)));
typedef int8_t Bytes __attribute__((vector_size(16)));

#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__)
#define FOR_EACH_PROCESSOR __attribute__((target_clones("arch=x86-64-v4", "default")))
#else
#define FOR_EACH_PROCESSOR
#endif
#define INLINE static inline __attribute__((always_inline))

enum { WIDTH = 16, PARTS = 4, STEP = PARTS * WIDTH }; /* elements of a vector; vectors and elements of a step */
enum { LINE = 64, AHEAD = 4096, MOST_ROWS = 4 };      /* bytes of a cache line and to a prefetch; rows at once */
enum { INT8 = 1, BFLOAT16 = 2 };                      /* bytes of an element */

/* Rows that lie `stride` bytes apart; a row of INT8 has a scale in bfloat16, and these lie `scale_stride` apart. */
typedef struct {
    const char *rows, *scales;
    ptrdiff_t stride, scale_stride;
} Matrix;

INLINE float wide_one(uint16_t half)
{
    uint32_t word = (uint32_t)half << 16;
    float value;
    memcpy(&value, &word, sizeof value);
    return value;
}

INLINE Floats wide(const char *row, ptrdiff_t index, const int element)
{
    if (element == INT8) {
        Bytes bytes;
        memcpy(&bytes, row + index, sizeof bytes);
        Integers integers = __builtin_convertvector(__builtin_convertvector(bytes, Shorts), Integers);
        return __builtin_convertvector(integers, Floats); /* in one step GCC 12 would convert number by number */
    }
    Halves halves;
    memcpy(&halves, row + index * BFLOAT16, sizeof halves);
    return (Floats)(__builtin_convertvector(halves, Words) << 16);
}

INLINE float wide_at(const char *row, ptrdiff_t index, const int element)
{
    if (element == INT8)
        return (float)((const int8_t *)row)[index];
    uint16_t half;
    memcpy(&half, row + index * BFLOAT16, sizeof half);
    return wide_one(half);
}

INLINE uint16_t rounded(float value) /* to the nearest, ties to even, as torch does */
{
    uint32_t word;
    memcpy(&word, &value, sizeof word);
    return value != value ? 0x7fc0 : (uint16_t)((word + 0x7fff + ((word >> 16) & 1)) >> 16);
}

INLINE void prefetch(const char *row, ptrdiff_t index, const int element)
{
    for (int byte = 0; byte < STEP * element; byte += LINE)
        __builtin_prefetch(row + index * element + AHEAD + byte);
}

INLINE float scale_of(const Matrix *matrix, ptrdiff_t row, const int element)
{
    return element == INT8 ? wide_at(matrix->scales + row * matrix->scale_stride, 0, BFLOAT16) : 1;
}

INLINE float total(Floats vector)
{
    Eight halves[2];
    memcpy(halves, &vector, sizeof halves);
    halves[0] += halves[1];
    Four quarters[2];
    memcpy(quarters, &halves[0], sizeof quarters);
    quarters[0] += quarters[1];
    return (quarters[0][0] + quarters[0][2]) + (quarters[0][1] + quarters[0][3]);
}

/* e to the power of numbers up to 0: a power of 2, and for what is left the polynomial of Cephes. */
INLINE Floats exponentials(Floats powers)
{
    const Integers tiny = powers < -87;
    powers = (Floats)(((Integers)powers & ~tiny) | ((Integers)((Floats){0} - 87) & tiny));
    Floats whole = powers * 1.44269504f + 0x1.8p23f - 0x1.8p23f; /* rounded */
    Floats x = powers - whole * 0.693359375f + whole * 2.12194440e-4f;
    Floats value = ((((1.9875691500e-4f * x + 1.3981999507e-3f) * x + 8.3334519073e-3f) * x + 4.1665795894e-2f) * x +
                    1.6666665459e-1f) * x + 5.0000001201e-1f;
    return (value * x * x + x + 1) * (Floats)((__builtin_convertvector(whole, Integers) + 127) << 23);
}

/* Part of a step of a row. INT8 is read four numbers to a word, so that lane l of part p is element 4 l + p. */
INLINE Floats wide_part(const char *row, ptrdiff_t index, int part, const int element)
{
    if (element == BFLOAT16)
        return wide(row, index + part * WIDTH, element);
    Words words;
    memcpy(&words, row + index, sizeof words);
    return __builtin_convertvector((Integers)(words << (24 - 8 * part)) >> 24, Floats);
}

/* Widens rows with k elements, each step in the order in which `wide_part` reads a matrix. */
static void widen(const uint16_t *from, float *to, ptrdiff_t rows, ptrdiff_t k, int element)
{
    for (ptrdiff_t r = 0; r < rows; r++, from += k, to += k)
        for (ptrdiff_t j = 0; j < k; j++) {
            ptrdiff_t step = j / STEP * STEP, place = j - step;
            int turned = element == INT8 && step + STEP <= k;
            to[j] = wide_one(from[turned ? step + place % WIDTH * PARTS + place / WIDTH : j]);
        }
}

/* sums[r][i] += inputs[r] . matrix[i], of a matrix of n rows with k elements, and inputs as `widen` makes them */
INLINE void add_by_rows(const Matrix *matrix, const int element, const float *inputs, float *sums, const int rows,
                        ptrdiff_t n, ptrdiff_t k)
{
    for (ptrdiff_t i = 0; i < n; i++) {
        const char *row = matrix->rows + i * matrix->stride;
        Floats partial[MOST_ROWS][2] = {0};
        ptrdiff_t j = 0;
        for (; j + STEP <= k; j += STEP) {
            prefetch(row, j, element);
            for (int part = 0; part < PARTS; part++) {
                Floats own = wide_part(row, j, part, element);
                for (int r = 0; r < rows; r++) {
                    Floats input;
                    memcpy(&input, inputs + r * k + j + part * WIDTH, sizeof input);
                    partial[r][part % 2] += own * input;
                }
            }
        }
        for (int r = 0; r < rows; r++) {
            float sum = total(partial[r][0] + partial[r][1]);
            for (ptrdiff_t rest = j; rest < k; rest++)
                sum += wide_at(row, rest, element) * inputs[r * k + rest];
            sums[r * n + i] += sum * scale_of(matrix, i, element);
        }
    }
}

/* sums[r] += inputs[r][j] * matrix[j] for all j, of a matrix of k rows with n elements; one in INT8 lies by rows */
INLINE void add_by_columns(const Matrix *matrix, const int element, const float *inputs, float *sums, const int rows,
                           ptrdiff_t n, ptrdiff_t k)
{
    for (ptrdiff_t j = 0; j < k; j++) {
        const char *row = matrix->rows + j * matrix->stride;
        float scaled[MOST_ROWS];
        for (int r = 0; r < rows; r++)
            scaled[r] = inputs[r * k + j];
        ptrdiff_t i = 0;
        for (; i + STEP <= n; i += STEP) {
            prefetch(row, i, element);
            for (int part = 0; part < PARTS; part++) {
                Floats own = wide(row, i + part * WIDTH, element);
                for (int r = 0; r < rows; r++) {
                    float *there = sums + r * n + i + part * WIDTH;
                    Floats sum;
                    memcpy(&sum, there, sizeof sum);
                    sum += own * scaled[r];
                    memcpy(there, &sum, sizeof sum);
                }
            }
        }
        for (; i < n; i++)
            for (int r = 0; r < rows; r++)
                sums[r * n + i] += wide_at(row, i, element) * scaled[r];
    }
}

/* outputs[r] = the sum over j of weights[r][j] * values[j], of up to `MOST_ROWS` rows: sums stay in registers. */
INLINE void weigh(const Matrix *values, const int element, const float *weights, float *outputs, const int rows,
                  ptrdiff_t n, ptrdiff_t k)
{
    ptrdiff_t i = 0;
    for (; i + STEP <= n; i += STEP) {
        Floats sums[MOST_ROWS][PARTS] = {0};
        for (ptrdiff_t j = 0; j < k; j++) {
            const char *row = values->rows + j * values->stride;
            const float scale = scale_of(values, j, element);
            prefetch(row, i, element);
            for (int part = 0; part < PARTS; part++) {
                Floats own = scale * wide(row, i + part * WIDTH, element);
                for (int r = 0; r < rows; r++)
                    sums[r][part] += own * weights[r * k + j];
            }
        }
        for (int r = 0; r < rows; r++)
            memcpy(outputs + r * n + i, sums[r], sizeof sums[r]);
    }
    for (; i < n; i++)
        for (int r = 0; r < rows; r++) {
            float sum = 0;
            for (ptrdiff_t j = 0; j < k; j++)
                sum += weights[r * k + j] * scale_of(values, j, element) *
                       wide_at(values->rows + j * values->stride, i, element);
            outputs[r * n + i] = sum;
        }
}

/* The compiler unrolls the loops over rows where it knows how many there are. */
#define FOR_ROWS(add, element)                                                                                         \
    for (; rows > 0; rows -= MOST_ROWS, inputs += MOST_ROWS * k, sums += MOST_ROWS * n) {                              \
        if (rows == 1)                                                                                                 \
            add(matrix, element, inputs, sums, 1, n, k);                                                               \
        else if (rows == 2)                                                                                            \
            add(matrix, element, inputs, sums, 2, n, k);                                                               \
        else if (rows == 3)                                                                                            \
            add(matrix, element, inputs, sums, 3, n, k);                                                               \
        else                                                                                                           \
            add(matrix, element, inputs, sums, MOST_ROWS, n, k);                                                       \
    }

FOR_EACH_PROCESSOR
static void by_rows(const Matrix *matrix, const float *inputs, float *sums, ptrdiff_t rows, ptrdiff_t n, ptrdiff_t k)
{
    if (matrix->scales == NULL)
        FOR_ROWS(add_by_rows, BFLOAT16)
    else
        FOR_ROWS(add_by_rows, INT8)
}

FOR_EACH_PROCESSOR
static void by_columns(const Matrix *matrix, const float *inputs, float *sums, ptrdiff_t rows, ptrdiff_t n, ptrdiff_t k)
{
    FOR_ROWS(add_by_columns, BFLOAT16)
}

FOR_EACH_PROCESSOR
static void weighted(const Matrix *matrix, const float *inputs, float *sums, ptrdiff_t rows, ptrdiff_t n, ptrdiff_t k)
{
    if (matrix->scales == NULL)
        FOR_ROWS(weigh, BFLOAT16)
    else
        FOR_ROWS(weigh, INT8)
}

FOR_EACH_PROCESSOR
static void softmax(float *row, ptrdiff_t n, float scale)
{
    float largest = row[0], sum = 0;
    for (ptrdiff_t i = 1; i < n; i++)
        largest = row[i] > largest ? row[i] : largest;
    for (ptrdiff_t i = 0; i < n; i += WIDTH) {
        size_t bytes = sizeof(float) * (n - i < WIDTH ? n - i : WIDTH);
        Floats numbers = (Floats){0} - INFINITY; /* whose exponentials are as good as 0 */
        memcpy(&numbers, row + i, bytes);
        numbers = exponentials(scale * (numbers - largest));
        sum += total(numbers);
        memcpy(row + i, &numbers, bytes);
    }
    for (ptrdiff_t i = 0; i < n; i++)
        row[i] /= sum;
}

