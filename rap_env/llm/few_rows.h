/* Products of a few rows with a matrix, summed in float32: one pass over matrices in bfloat16 or INT8, as they lie in
   memory. Four rows of the matrix are multiplied by a few inputs at once, or eight columns, where it is stored by
   columns, are added to the sums of all inputs. These rows or columns lie far apart, for a processor reads several such
   streams faster than one. */

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifdef __AVX512F__
enum { WIDTH = 16, MOST_ROWS = 4 }; /* elements of a vector, and inputs at once, whose sums are kept in registers */
#else
enum { WIDTH = 8, MOST_ROWS = 2 };
#endif
enum { PARTS = 4, STEP = PARTS * WIDTH };           /* vectors and elements of a step */
enum { LINE = 64, AHEAD = 1024, FAR_AHEAD = 4096 }; /* bytes of a line; to a prefetch in several streams, or one */
enum { SIDE = 4, COLUMNS = 8 };                     /* rows or columns of a matrix at once */
enum { SUMS = 8192 };                               /* that stay in a processor's cache */
enum { INT8 = 1, BFLOAT16 = 2, WORD = 4 };          /* bytes of an element, and of a word */

typedef float Floats __attribute__((vector_size(4 * WIDTH)));
typedef float Four __attribute__((vector_size(16)));
typedef int32_t FourIntegers __attribute__((vector_size(16)));
typedef uint32_t Words __attribute__((vector_size(4 * WIDTH)));
typedef int32_t Integers __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t Halves __attribute__((vector_size(2 * WIDTH)));
typedef int16_t Shorts __attribute__((vector_size(2 * WIDTH)));
typedef int8_t Bytes __attribute__((vector_size(WIDTH)));

#define INLINE static inline __attribute__((always_inline))

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

INLINE void prefetch(const char *row, ptrdiff_t index, const int element, int ahead)
{
    for (int byte = 0; byte < STEP * element; byte += LINE)
        __builtin_prefetch(row + index * element + ahead + byte);
}

INLINE float scale_of(const Matrix *matrix, ptrdiff_t row, const int element)
{
    return element == INT8 ? wide_at(matrix->scales + row * matrix->scale_stride, 0, BFLOAT16) : 1;
}

INLINE Four folded(Floats vector) /* to the sums of every fourth number */
{
    Four fours[WIDTH / 4];
    memcpy(fours, &vector, sizeof fours);
    for (int apart = WIDTH / 8; apart > 0; apart /= 2)
        for (int i = 0; i < apart; i++)
            fours[i] += fours[i + apart];
    return fours[0];
}

INLINE float total(Floats vector)
{
    Four sums = folded(vector);
    return (sums[0] + sums[2]) + (sums[1] + sums[3]);
}

#ifdef __clang__
#define MIXED(left, right, ...) __builtin_shufflevector(left, right, __VA_ARGS__)
#else
#define MIXED(left, right, ...) __builtin_shuffle(left, right, (FourIntegers){__VA_ARGS__})
#endif

INLINE Four totals_of_four(const Floats vectors[4])
{
    Four sums[4];
    for (int i = 0; i < 4; i++)
        sums[i] = folded(vectors[i]);
    const Four front = MIXED(sums[0], sums[1], 0, 4, 1, 5) + MIXED(sums[0], sums[1], 2, 6, 3, 7);
    const Four back = MIXED(sums[2], sums[3], 0, 4, 1, 5) + MIXED(sums[2], sums[3], 2, 6, 3, 7);
    return MIXED(front, back, 0, 1, 4, 5) + MIXED(front, back, 2, 3, 6, 7);
}

/* Part of a step of a row. It is read as words, with two numbers in bfloat16 or four in INT8 to a word: of W vectors of
   words with m numbers to each, lane l of part v * m + p is element (v * WIDTH + l) * m + p. */
INLINE Floats wide_part(const char *row, ptrdiff_t index, int part, const int element)
{
    const int numbers = WORD / element, vector = part / numbers, place = part % numbers;
    Words words;
    memcpy(&words, row + index * element + vector * sizeof words, sizeof words);
    if (element == BFLOAT16)
        return (Floats)(place == 0 ? words << 16 : words & 0xffff0000);
    return __builtin_convertvector((Integers)(words << (24 - 8 * place)) >> 24, Floats);
}

/* Widens rows with k elements, [rows][k] -> [k][rows]. */
static void widen_turned(const uint16_t *from, float *to, ptrdiff_t rows, ptrdiff_t k)
{
    for (ptrdiff_t r = 0; r < rows; r++)
        for (ptrdiff_t j = 0; j < k; j++)
            to[j * rows + r] = wide_one(from[r * k + j]);
}

/* Widens rows with k elements, each step in the order of `wide_part` with so many numbers to a word. */
static void widen(const uint16_t *from, float *to, ptrdiff_t rows, ptrdiff_t k, ptrdiff_t numbers)
{
    const ptrdiff_t whole = k / STEP * STEP;
    for (ptrdiff_t r = 0; r < rows; r++, from += k, to += k) {
        for (ptrdiff_t j = 0; j < whole; j++) {
            const ptrdiff_t part = j % STEP / WIDTH, word = part / numbers * WIDTH + j % WIDTH;
            to[j] = wide_one(from[j / STEP * STEP + word * numbers + part % numbers]);
        }
        for (ptrdiff_t j = whole; j < k; j++)
            to[j] = wide_one(from[j]);
    }
}

/* sums[r][s * run + i] += inputs[r] . matrix[s * run + i], for `side` rows that lie so far apart. */
INLINE void add_side(const Matrix *matrix, const int element, const float *inputs, float *sums, const int rows,
                     const int side, ptrdiff_t run, ptrdiff_t i, ptrdiff_t n, ptrdiff_t k)
{
    const char *own[SIDE];
    Floats partial[MOST_ROWS][SIDE] = {0};
    for (int s = 0; s < side; s++)
        own[s] = matrix->rows + (s * run + i) * matrix->stride;
    ptrdiff_t j = 0;
    for (; j + STEP <= k; j += STEP) {
        for (int s = 0; s < side; s++)
            prefetch(own[s], j, element, AHEAD);
        for (int part = 0; part < PARTS; part++) {
            Floats numbers[SIDE];
            for (int s = 0; s < side; s++)
                numbers[s] = wide_part(own[s], j, part, element);
            for (int r = 0; r < rows; r++) {
                Floats input;
                memcpy(&input, inputs + r * k + j + part * WIDTH, sizeof input);
                for (int s = 0; s < side; s++)
                    partial[r][s] += numbers[s] * input;
            }
        }
    }
    for (int r = 0; r < rows; r++) {
        const Four totals_of_row = totals_of_four(partial[r]); /* zeros where there is one row of the matrix */
        for (int s = 0; s < side; s++) {
            float sum = totals_of_row[s];
            for (ptrdiff_t rest = j; rest < k; rest++)
                sum += wide_at(own[s], rest, element) * inputs[r * k + rest];
            sums[r * n + s * run + i] += sum * scale_of(matrix, s * run + i, element);
        }
    }
}

/* The compiler unrolls loops over up to MOST_ROWS rows where it knows how many there are. */
#define FOR_ROWS(call)                                                                                                 \
    for (ptrdiff_t row = 0; row < rows; row += MOST_ROWS) {                                                            \
        const ptrdiff_t left = rows - row;                                                                             \
        if (left >= MOST_ROWS)                                                                                         \
            call(MOST_ROWS);                                                                                           \
        else if (left == 1)                                                                                            \
            call(1);                                                                                                   \
        else if (left == 2)                                                                                            \
            call(2);                                                                                                   \
        else                                                                                                           \
            call(MOST_ROWS - 1);                                                                                       \
    }

/* sums[r][i] += inputs[r] . matrix[i], of a matrix of n rows with k elements, and inputs as `widen` makes them. */
INLINE void add_by_rows(const Matrix *matrix, const int element, const float *inputs, float *sums, ptrdiff_t rows,
                        ptrdiff_t n, ptrdiff_t k)
{
    const ptrdiff_t run = n / SIDE;
#define OF_RUNS(few) add_side(matrix, element, inputs + row * k, sums + row * n, few, SIDE, run, i, n, k)
    for (ptrdiff_t i = 0; i < run; i++)
        FOR_ROWS(OF_RUNS)
#define OF_ONE(few) add_side(matrix, element, inputs + row * k, sums + row * n, few, 1, 0, i, n, k)
    for (ptrdiff_t i = SIDE * run; i < n; i++)
        FOR_ROWS(OF_ONE)
}

/* sums[r] += inputs[c * run + j][r] * matrix[c * run + j], of so many columns that lie so far apart, from element
   `first` of their n elements to the one before `last`. */
INLINE void add_columns(const Matrix *matrix, const float *inputs, float *sums, ptrdiff_t rows, const int columns,
                        ptrdiff_t run, ptrdiff_t j, ptrdiff_t first, ptrdiff_t last, ptrdiff_t n)
{
    const char *own[COLUMNS];
    for (int c = 0; c < columns; c++)
        own[c] = matrix->rows + (c * run + j) * matrix->stride;
    for (; first + WIDTH <= last; first += WIDTH) {
        Floats numbers[COLUMNS];
        for (int c = 0; c < columns; c++) {
            __builtin_prefetch(own[c] + first * BFLOAT16 + AHEAD);
            numbers[c] = wide(own[c], first, BFLOAT16);
        }
        for (ptrdiff_t r = 0; r < rows; r++) {
            Floats sum;
            memcpy(&sum, sums + r * n + first, sizeof sum);
            for (int c = 0; c < columns; c++)
                sum += numbers[c] * inputs[(c * run + j) * rows + r];
            memcpy(sums + r * n + first, &sum, sizeof sum);
        }
    }
    for (; first < last; first++)
        for (ptrdiff_t r = 0; r < rows; r++)
            for (int c = 0; c < columns; c++)
                sums[r * n + first] += wide_at(own[c], first, BFLOAT16) * inputs[(c * run + j) * rows + r];
}

static void by_rows(const Matrix *matrix, const float *inputs, float *sums, ptrdiff_t rows, ptrdiff_t n, ptrdiff_t k)
{
    if (matrix->scales == NULL)
        add_by_rows(matrix, BFLOAT16, inputs, sums, rows, n, k);
    else
        add_by_rows(matrix, INT8, inputs, sums, rows, n, k);
}

/* sums[r] += inputs[j][r] * matrix[j] for all j, of a matrix of k rows with n elements. */
static void by_columns(const Matrix *matrix, const float *inputs, float *sums, ptrdiff_t rows, ptrdiff_t n, ptrdiff_t k)
{
    const ptrdiff_t run = k / COLUMNS, most = rows < SUMS / WIDTH ? SUMS / rows : WIDTH;
    for (ptrdiff_t first = 0, last; first < n; first = last) {
        last = n - first < most ? n : first + most;
        for (ptrdiff_t j = 0; j < run; j++)
            add_columns(matrix, inputs, sums, rows, COLUMNS, run, j, first, last, n);
        for (ptrdiff_t j = COLUMNS * run; j < k; j++)
            add_columns(matrix, inputs, sums, rows, 1, 0, j, first, last, n);
    }
}
