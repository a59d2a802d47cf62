/* The extension modules `_few_rows_avx512` and `_few_rows_avx2`: what a layer computes, on addresses of tensors. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdlib.h>

#include "few_rows.h"
#include "one_token.h"
#include "between.h"
#include "pairs.h"
#include "one_row.h"

#ifdef __AVX512F__
#define NAME "_few_rows_avx512"
#define INIT PyInit__few_rows_avx512
#else
#define NAME "_few_rows_avx2"
#define INIT PyInit__few_rows_avx2
#endif

/* Reads numbers: addresses, sizes, strides in bytes. */
static int numbers(PyObject *const *arguments, Py_ssize_t n_arguments, Py_ssize_t *read, Py_ssize_t expected)
{
    if (n_arguments != expected)
        return PyErr_Format(PyExc_TypeError, "expected %zd numbers; got %zd", expected, n_arguments), -1;
    for (Py_ssize_t index = 0; index < expected; index++) {
        read[index] = PyLong_AsSsize_t(arguments[index]);
        if (read[index] == -1 && PyErr_Occurred())
            return -1;
    }
    return 0;
}

PyDoc_STRVAR(product_doc,
             "product(matrix, stride, scales, columns, bias, inputs, outputs, rows, n, k, pairs)\n\n"
             "outputs[rows][n] = inputs[rows][k] times a transposed matrix [n][k], plus bias[n].\n\n"
             "`stride` lies between rows of the matrix or, where `columns` is not 0, between its columns. `scales`\n"
             "are those of the rows of a matrix in INT8; all else is bfloat16. What there is none of has address 0.\n"
             "`pairs` is whether to use the instruction for pairs, which processors have where PAIRS is not 0.");

typedef struct {
    Matrix matrix;
    int columns;
    const uint16_t *bias, *inputs;
    uint16_t *outputs;
    ptrdiff_t rows, n, k;
} Product;

/* Whether there was memory for it. */
static int multiplied(const Product *given)
{
    ptrdiff_t rows = given->rows, n = given->n, k = given->k;
    float *inputs = malloc(rows * (k + n) * sizeof *inputs), *sums = inputs + rows * k;
    if (inputs == NULL)
        return 0;
    if (given->columns)
        widen_turned(given->inputs, inputs, rows, k);
    else
        widen(given->inputs, inputs, rows, k, WORD / (given->matrix.scales == NULL ? BFLOAT16 : INT8));
    for (ptrdiff_t i = 0; i < rows * n; i++)
        sums[i] = given->bias == NULL ? 0 : wide_one(given->bias[i % n]);
    (given->columns ? by_columns : by_rows)(&given->matrix, inputs, sums, rows, n, k);
    for (ptrdiff_t i = 0; i < rows * n; i++)
        given->outputs[i] = rounded(sums[i]);
    free(inputs);
    return 1;
}

static int multiplied_by_pairs(const Product *given)
{
#ifdef PAIRS
    const Matrix *matrix = &given->matrix;
    const int one = given->rows == 1;
    void *room = malloc(one ? one_room(given->n, given->k) : pairs_room(given->rows, given->k));
    if (room == NULL)
        return 0;
    if (one)
        (given->columns ? one_by_columns : one_by_rows)(matrix, given->bias, given->inputs, given->outputs, room,
                                                        given->n, given->k);
    else
        (given->columns ? pairs_by_columns : pairs_by_rows)(matrix, given->bias, given->inputs, given->outputs, room,
                                                            given->rows, given->n, given->k);
    free(room);
    return 1;
#else
    return multiplied(given);
#endif
}

static PyObject *product(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t n_arguments)
{
    enum { MATRIX, STRIDE, SCALES, COLUMNS, BIAS, INPUTS, OUTPUTS, ROWS, N, K, BY_PAIRS, ALL };
    Py_ssize_t given[ALL];
    if (numbers(arguments, n_arguments, given, ALL) < 0)
        return NULL;
    Product asked = {{(const char *)given[MATRIX], (const char *)given[SCALES], given[STRIDE], BFLOAT16},
                     given[COLUMNS] != 0,
                     (const uint16_t *)given[BIAS],
                     (const uint16_t *)given[INPUTS],
                     (uint16_t *)given[OUTPUTS],
                     given[ROWS],
                     given[N],
                     given[K]};
    int done;
    Py_BEGIN_ALLOW_THREADS
    done = given[BY_PAIRS] ? multiplied_by_pairs(&asked) : multiplied(&asked);
    Py_END_ALLOW_THREADS
    if (!done)
        return PyErr_NoMemory();
    Py_RETURN_NONE;
}

PyDoc_STRVAR(attend_doc,
             "attend(queries, states, outputs, caches, int8, pairs, heads, group, channels, scale)\n\n"
             "outputs[sequences][heads][group][channels] = what the query heads of one new token of each sequence read\n"
             "of its own keys and values, those of the new token included.\n\n"
             "`caches` has three numbers for each sequence: where its keys and values [2][heads][capacity][channels]\n"
             "lie, the capacity, and how many tokens are in front of the new one. `states` [2][heads][sequences]\n"
             "[channels] are the new token's in bfloat16, which are written first; with address 0 they are there. In\n"
             "INT8 a token's scale lies behind its channels. `scale` is that of the scores.");

typedef struct {
    const uint16_t *queries, *states;
    uint16_t *outputs;
    Py_ssize_t int8, by_pairs, heads, group, channels;
    float scale;
} Attention;

/* One sequence's token, of `index`. Room for wide queries, outputs, scores and SIDE keys. */
static void attend_one(const Attention *all, Py_ssize_t index, Py_ssize_t n_sequences, const Py_ssize_t cache[3],
                       float *room)
{
    ptrdiff_t group = all->group, channels = all->channels, size = group * channels;
    ptrdiff_t bytes = all->int8 ? channels + BFLOAT16 : channels * BFLOAT16;
    ptrdiff_t capacity = cache[1], before = cache[2], tokens = before + 1;
    float *sums = room + size, *scores = sums + size;
    for (Py_ssize_t head = 0; head < all->heads; head++) {
        Matrix kept[2];
        for (int which = 0; which < 2; which++) {
            char *first = (char *)cache[0] + (which * all->heads + head) * capacity * bytes;
            if (all->states != NULL) {
                const uint16_t *own = all->states + ((which * all->heads + head) * n_sequences + index) * channels;
                if (all->int8)
                    encode(own, first + before * bytes, channels);
                else
                    memcpy(first + before * bytes, own, bytes);
            }
            kept[which] = (Matrix){first, all->int8 ? first + channels : NULL, bytes, bytes};
        }
        const uint16_t *queries = all->queries + (index * all->heads + head) * size;
        uint16_t *outputs = all->outputs + (index * all->heads + head) * size;
#ifdef PAIRS
        if (all->by_pairs)
            pairs_of_keys(&kept[0], queries, scores, scores + group * tokens, group, tokens, channels);
        else
#endif
        {
            widen(queries, room, group, channels, WORD / (all->int8 ? INT8 : BFLOAT16));
            memset(scores, 0, group * tokens * sizeof *scores);
            by_rows(&kept[0], room, scores, group, tokens, channels);
        }
        for (ptrdiff_t query = 0; query < group; query++)
            softmax(scores + query * tokens, tokens, all->scale);
        weighted(&kept[1], scores, sums, group, channels, tokens);
        for (ptrdiff_t i = 0; i < size; i++)
            outputs[i] = rounded(sums[i]);
    }
}

static PyObject *attend(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t n_arguments)
{
    enum { QUERIES, STATES, OUTPUTS, CACHES, IN_INT8, BY_PAIRS, HEADS, GROUP_HEADS, CHANNELS, SCALE, ALL };
    Py_ssize_t front[CACHES], back[SCALE - IN_INT8], *caches, most = 0;
    if (n_arguments != ALL || !PyTuple_Check(arguments[CACHES]))
        return PyErr_Format(PyExc_TypeError, "expected %d arguments, the fourth a tuple", ALL);
    if (numbers(arguments, CACHES, front, CACHES) < 0 ||
        numbers(arguments + IN_INT8, SCALE - IN_INT8, back, SCALE - IN_INT8) < 0)
        return NULL;
    float scale = (float)PyFloat_AsDouble(arguments[SCALE]);
    if (PyErr_Occurred())
        return NULL;
    Attention all = {(const uint16_t *)front[QUERIES], (const uint16_t *)front[STATES], (uint16_t *)front[OUTPUTS],
                     back[0], back[1], back[2], back[3], back[4], scale};
    Py_ssize_t n_numbers = PyTuple_GET_SIZE(arguments[CACHES]), n_sequences = n_numbers / 3;
    if ((caches = malloc((n_numbers + 1) * sizeof *caches)) == NULL)
        return PyErr_NoMemory();
    if (numbers(PySequence_Fast_ITEMS(arguments[CACHES]), n_numbers, caches, 3 * n_sequences) < 0)
        return free(caches), NULL;
    for (Py_ssize_t index = 0; index < n_sequences; index++)
        most = caches[3 * index + 2] >= most ? caches[3 * index + 2] + 1 : most;
    size_t n_floats = all.group * (2 * all.channels + most) + SIDE * (all.channels + LANES);
    float *room = malloc(n_floats * sizeof *room);
    if (room == NULL)
        return free(caches), PyErr_NoMemory();
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t index = 0; index < n_sequences; index++)
        attend_one(&all, index, n_sequences, caches + 3 * index, room);
    Py_END_ALLOW_THREADS
    free(room);
    free(caches);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(norm_doc,
             "norm(inputs, weight, outputs, rows, k, epsilon)\n\n"
             "outputs[rows][k] = weight[k] times inputs[rows][k] over the root of each row's mean square plus epsilon.");

static PyObject *norm(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t n_arguments)
{
    enum { INPUTS, WEIGHT, OUTPUTS, ROWS, K, EPSILON, ALL };
    Py_ssize_t given[EPSILON];
    if (n_arguments != ALL)
        return PyErr_Format(PyExc_TypeError, "expected %d numbers; got %zd", ALL, n_arguments);
    if (numbers(arguments, EPSILON, given, EPSILON) < 0)
        return NULL;
    float epsilon = (float)PyFloat_AsDouble(arguments[EPSILON]);
    if (PyErr_Occurred())
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    norm_rows((const uint16_t *)given[INPUTS], (const uint16_t *)given[WEIGHT], (uint16_t *)given[OUTPUTS], given[ROWS],
              given[K], epsilon);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

PyDoc_STRVAR(rotate_doc,
             "rotate(inputs, cosines, sines, outputs, rows, heads, half)\n\n"
             "outputs[rows][heads][2 half] = inputs turned by angles of which cosines and sines [rows][2 half] are given.");

static PyObject *rotate(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t n_arguments)
{
    enum { INPUTS, COSINES, SINES, OUTPUTS, ROWS, HEADS, HALF, ALL };
    Py_ssize_t given[ALL];
    if (numbers(arguments, n_arguments, given, ALL) < 0)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    turn_rows((const uint16_t *)given[INPUTS], (const uint16_t *)given[COSINES], (const uint16_t *)given[SINES],
              (uint16_t *)given[OUTPUTS], given[ROWS], given[HEADS], given[HALF]);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

#define METHOD(name) {#name, (PyCFunction)(void (*)(void))name, METH_FASTCALL, name##_doc}
static PyMethodDef methods[] = {METHOD(product), METHOD(attend), METHOD(norm), METHOD(rotate), {NULL}};
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, NAME, NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC INIT(void)
{
    PyObject *module = PyModule_Create(&definition);
#ifdef PAIRS
    int pairs = has_pairs();
#else
    int pairs = 0;
#endif
    if (module != NULL && PyModule_AddIntConstant(module, "PAIRS", pairs) < 0)
        Py_CLEAR(module);
    return module;
}
