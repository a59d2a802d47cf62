/* Products of a few rows with a matrix, and attention of one token, in bfloat16 and summed in float32: one pass over
   matrices, keys and values as they lie in memory.

   A row of the matrix, or a column where it is stored by columns, is read once from memory and then from the cache for
   all input rows. One stream with a prefetch ahead of it is read at the rate of memory; several at once were not. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef float Floats __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__)
#define FOR_EACH_PROCESSOR __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_PROCESSOR
#endif
#define INLINE static inline __attribute__((always_inline))

enum { WIDTH = 16, PARTS = 4, STEP = PARTS * WIDTH }; /* elements of a vector; vectors and elements of a step */
enum { AHEAD = 2048, MOST_ROWS = 4 };                 /* elements from a step to what it prefetches; rows at once */

INLINE Floats wide(const uint16_t *from)
{
    Halves halves;
    memcpy(&halves, from, sizeof halves);
    return (Floats)(__builtin_convertvector(halves, Words) << 16);
}

INLINE float wide_one(uint16_t half)
{
    uint32_t word = (uint32_t)half << 16;
    float value;
    memcpy(&value, &word, sizeof value);
    return value;
}

INLINE uint16_t rounded(float value) /* to the nearest, ties to even, as torch does */
{
    uint32_t word;
    memcpy(&word, &value, sizeof word);
    return value != value ? 0x7fc0 : (uint16_t)((word + 0x7fff + ((word >> 16) & 1)) >> 16);
}

INLINE void prefetch(const uint16_t *from)
{
    __builtin_prefetch(from + AHEAD);
    __builtin_prefetch(from + AHEAD + STEP / 2);
}

INLINE float total(Floats vector)
{
    float lanes[WIDTH];
    memcpy(lanes, &vector, sizeof lanes);
    for (int half = WIDTH / 2; half > 0; half /= 2)
        for (int lane = 0; lane < half; lane++)
            lanes[lane] += lanes[lane + half];
    return lanes[0];
}

/* sums[r][i] += inputs[r] . matrix[i], of a matrix [n][stride] whose rows have k elements */
INLINE void add_by_rows(const uint16_t *matrix, Py_ssize_t stride, const float *inputs, float *sums, const int rows,
                        Py_ssize_t n, Py_ssize_t k)
{
    for (Py_ssize_t i = 0; i < n; i++, matrix += stride) {
        Floats partial[MOST_ROWS][2] = {0};
        Py_ssize_t j = 0;
        for (; j + STEP <= k; j += STEP) {
            prefetch(matrix + j);
            for (int part = 0; part < PARTS; part++) {
                Floats own = wide(matrix + j + part * WIDTH);
                for (int r = 0; r < rows; r++) {
                    Floats input;
                    memcpy(&input, inputs + r * k + j + part * WIDTH, sizeof input);
                    partial[r][part % 2] += own * input;
                }
            }
        }
        for (int r = 0; r < rows; r++) {
            float sum = total(partial[r][0] + partial[r][1]);
            for (Py_ssize_t rest = j; rest < k; rest++)
                sum += wide_one(matrix[rest]) * inputs[r * k + rest];
            sums[r * n + i] += sum;
        }
    }
}

/* sums[r] += inputs[r][j] * matrix[j] for all j, of a matrix [k][stride] whose rows have n elements */
INLINE void add_by_columns(const uint16_t *matrix, Py_ssize_t stride, const float *inputs, float *sums, const int rows,
                           Py_ssize_t n, Py_ssize_t k)
{
    for (Py_ssize_t j = 0; j < k; j++, matrix += stride) {
        Py_ssize_t i = 0;
        for (; i + STEP <= n; i += STEP) {
            prefetch(matrix + i);
            for (int part = 0; part < PARTS; part++) {
                Floats own = wide(matrix + i + part * WIDTH);
                for (int r = 0; r < rows; r++) {
                    Floats sum;
                    float *there = sums + r * n + i + part * WIDTH;
                    memcpy(&sum, there, sizeof sum);
                    sum += own * inputs[r * k + j];
                    memcpy(there, &sum, sizeof sum);
                }
            }
        }
        for (; i < n; i++)
            for (int r = 0; r < rows; r++)
                sums[r * n + i] += wide_one(matrix[i]) * inputs[r * k + j];
    }
}

/* The compiler unrolls the loops over rows where it knows how many there are. */
#define FOR_ROWS(add)                                                                                                  \
    for (; rows > 0; rows -= MOST_ROWS, inputs += MOST_ROWS * k, sums += MOST_ROWS * n)                                \
        switch (rows) {                                                                                                \
        case 1:                                                                                                        \
            add(matrix, stride, inputs, sums, 1, n, k);                                                                \
            break;                                                                                                     \
        case 2:                                                                                                        \
            add(matrix, stride, inputs, sums, 2, n, k);                                                                \
            break;                                                                                                     \
        case 3:                                                                                                        \
            add(matrix, stride, inputs, sums, 3, n, k);                                                                \
            break;                                                                                                     \
        default:                                                                                                       \
            add(matrix, stride, inputs, sums, MOST_ROWS, n, k);                                                        \
        }

FOR_EACH_PROCESSOR
static void by_rows(const uint16_t *matrix, Py_ssize_t stride, const float *inputs, float *sums, Py_ssize_t rows,
                    Py_ssize_t n, Py_ssize_t k)
{
    FOR_ROWS(add_by_rows)
}

FOR_EACH_PROCESSOR
static void by_columns(const uint16_t *matrix, Py_ssize_t stride, const float *inputs, float *sums, Py_ssize_t rows,
                       Py_ssize_t n, Py_ssize_t k)
{
    FOR_ROWS(add_by_columns)
}

/* What the `group` query heads of one KV head read of its keys and values [tokens][channels]; scores [group][tokens]
   and sums [group][channels] are room for it. */
FOR_EACH_PROCESSOR
static void attend_head(const float *queries, const uint16_t *keys, const uint16_t *values, float *scores, float *sums,
                        Py_ssize_t group, Py_ssize_t channels, Py_ssize_t tokens)
{
    memset(scores, 0, group * tokens * sizeof(float));
    memset(sums, 0, group * channels * sizeof(float));
    by_rows(keys, channels, queries, scores, group, tokens, channels);
    for (Py_ssize_t query = 0; query < group; query++) {
        float *own = scores + query * tokens, largest = own[0], total = 0;
        for (Py_ssize_t token = 1; token < tokens; token++)
            largest = own[token] > largest ? own[token] : largest;
        for (Py_ssize_t token = 0; token < tokens; token++)
            total += own[token] = expf(own[token] - largest);
        for (Py_ssize_t token = 0; token < tokens; token++)
            own[token] /= total;
    }
    by_columns(values, channels, scores, sums, group, channels, tokens);
}

/* Reads numbers that are addresses, sizes and strides in elements. */
static int numbers(PyObject *const *arguments, Py_ssize_t n_arguments, Py_ssize_t *read, Py_ssize_t expected)
{
    if (n_arguments != expected) {
        PyErr_Format(PyExc_TypeError, "expected %zd arguments; got %zd", expected, n_arguments);
        return -1;
    }
    for (Py_ssize_t index = 0; index < expected; index++) {
        read[index] = PyLong_AsSsize_t(arguments[index]);
        if (read[index] == -1 && PyErr_Occurred())
            return -1;
    }
    return 0;
}

PyDoc_STRVAR(product_doc,
             "product(matrix, stride, columns, bias, inputs, outputs, rows, n, k)\n\n"
             "outputs[rows][n] = inputs[rows][k] times a transposed matrix [n][k], plus bias[n].\n\n"
             "`stride` lies between rows of the matrix or, where `columns` is not 0, between its columns; the address\n"
             "of no bias is 0.");

static PyObject *product(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t n_arguments)
{
    enum { MATRIX, STRIDE, COLUMNS, BIAS, INPUTS, OUTPUTS, ROWS, N, K, ALL };
    Py_ssize_t given[ALL];
    if (numbers(arguments, n_arguments, given, ALL) < 0)
        return NULL;
    const uint16_t *matrix = (const uint16_t *)given[MATRIX], *bias = (const uint16_t *)given[BIAS];
    const uint16_t *inputs = (const uint16_t *)given[INPUTS];
    uint16_t *outputs = (uint16_t *)given[OUTPUTS];
    Py_ssize_t rows = given[ROWS], n = given[N], k = given[K];

    float *room = PyMem_RawMalloc(rows * (k + n) * sizeof(float)), *sums = room + rows * k;
    if (room == NULL)
        return PyErr_NoMemory();
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t j = 0; j < rows * k; j++)
        room[j] = wide_one(inputs[j]);
    for (Py_ssize_t i = 0; i < rows * n; i++)
        sums[i] = bias == NULL ? 0 : wide_one(bias[i % n]);
    (given[COLUMNS] ? by_columns : by_rows)(matrix, given[STRIDE], room, sums, rows, n, k);
    for (Py_ssize_t i = 0; i < rows * n; i++)
        outputs[i] = rounded(sums[i]);
    Py_END_ALLOW_THREADS
    PyMem_RawFree(room);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(attend_doc,
             "attend(queries, keys, values, stride, outputs, heads, group, channels, tokens, scale)\n\n"
             "outputs[heads][group][channels] = what the query heads of one token read of keys and values\n"
             "[heads][tokens][channels]; `stride` lies between heads of both, and `scale` is that of the scores.");

static PyObject *attend(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t n_arguments)
{
    enum { QUERIES, KEYS, VALUES, STRIDE, OUTPUTS, HEADS, GROUP, CHANNELS, TOKENS, ALL };
    Py_ssize_t given[ALL];
    if (numbers(arguments, n_arguments - 1, given, ALL) < 0)
        return NULL;
    float scale = (float)PyFloat_AsDouble(arguments[ALL]);
    if (PyErr_Occurred())
        return NULL;
    const uint16_t *queries = (const uint16_t *)given[QUERIES];
    const uint16_t *keys = (const uint16_t *)given[KEYS], *values = (const uint16_t *)given[VALUES];
    uint16_t *outputs = (uint16_t *)given[OUTPUTS];
    Py_ssize_t group = given[GROUP], channels = given[CHANNELS], tokens = given[TOKENS], size = group * channels;

    float *room = PyMem_RawMalloc((2 * size + group * tokens) * sizeof(float)), *sums = room + size;
    if (room == NULL)
        return PyErr_NoMemory();
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t head = 0; head < given[HEADS]; head++, queries += size, outputs += size) {
        for (Py_ssize_t i = 0; i < size; i++)
            room[i] = wide_one(queries[i]) * scale;
        attend_head(room, keys + head * given[STRIDE], values + head * given[STRIDE], sums + size, sums, group, channels,
                    tokens);
        for (Py_ssize_t i = 0; i < size; i++)
            outputs[i] = rounded(sums[i]);
    }
    Py_END_ALLOW_THREADS
    PyMem_RawFree(room);
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {{"product", (PyCFunction)(void (*)(void))product, METH_FASTCALL, product_doc},
                                {"attend", (PyCFunction)(void (*)(void))attend, METH_FASTCALL, attend_doc},
                                {NULL, NULL, 0, NULL}};
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_few_rows", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__few_rows(void)
{
    return PyModule_Create(&definition);
}
