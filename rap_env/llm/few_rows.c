/* The extension module `_few_rows`: products and attention on addresses of tensors. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "few_rows.h"

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
             "product(matrix, stride, scales, columns, bias, inputs, outputs, rows, n, k)\n\n"
             "outputs[rows][n] = inputs[rows][k] times a transposed matrix [n][k], plus bias[n].\n\n"
             "`stride` lies between rows of the matrix or, where `columns` is not 0, between its columns. `scales`\n"
             "are those of the rows of a matrix in INT8; all else is bfloat16. What there is none of has address 0.");

static PyObject *product(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t n_arguments)
{
    enum { MATRIX, STRIDE, SCALES, COLUMNS, BIAS, INPUTS, OUTPUTS, ROWS, N, K, ALL };
    Py_ssize_t given[ALL];
    if (numbers(arguments, n_arguments, given, ALL) < 0)
        return NULL;
    Matrix matrix = {(const char *)given[MATRIX], (const char *)given[SCALES], given[STRIDE], BFLOAT16};
    const uint16_t *bias = (const uint16_t *)given[BIAS], *inputs = (const uint16_t *)given[INPUTS];
    uint16_t *outputs = (uint16_t *)given[OUTPUTS];
    Py_ssize_t rows = given[ROWS], n = given[N], k = given[K];

    float *room = PyMem_RawMalloc(rows * (k + n) * sizeof(float)), *sums = room + rows * k;
    if (room == NULL)
        return PyErr_NoMemory();
    Py_BEGIN_ALLOW_THREADS
    widen(inputs, room, rows, k, matrix.scales == NULL ? BFLOAT16 : INT8);
    for (Py_ssize_t i = 0; i < rows * n; i++)
        sums[i] = bias == NULL ? 0 : wide_one(bias[i % n]);
    (given[COLUMNS] ? by_columns : by_rows)(&matrix, room, sums, rows, n, k);
    for (Py_ssize_t i = 0; i < rows * n; i++)
        outputs[i] = rounded(sums[i]);
    Py_END_ALLOW_THREADS
    PyMem_RawFree(room);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(attend_doc,
             "attend(queries, keys, values, head_stride, stride, int8, outputs, heads, group, channels, tokens,"
             " scale)\n\n"
             "outputs[heads][group][channels] = what the query heads of one token read of keys and values\n"
             "[heads][tokens][channels], which have one `head_stride` and, between tokens, one `stride`. In INT8 a\n"
             "token's scale lies behind its channels. `scale` is that of the scores.");

static PyObject *attend(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t n_arguments)
{
    enum { QUERIES, KEYS, VALUES, HEAD_STRIDE, STRIDE, IN_INT8, OUTPUTS, HEADS, GROUP, CHANNELS, TOKENS, ALL };
    Py_ssize_t given[ALL];
    if (numbers(arguments, n_arguments - 1, given, ALL) < 0)
        return NULL;
    float scale = (float)PyFloat_AsDouble(arguments[ALL]);
    if (PyErr_Occurred())
        return NULL;
    const uint16_t *queries = (const uint16_t *)given[QUERIES];
    uint16_t *outputs = (uint16_t *)given[OUTPUTS];
    Py_ssize_t group = given[GROUP], channels = given[CHANNELS], tokens = given[TOKENS], size = group * channels;

    float *room = PyMem_RawMalloc((2 * size + group * tokens) * sizeof(float)), *sums = room + size;
    if (room == NULL)
        return PyErr_NoMemory();
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t head = 0; head < given[HEADS]; head++, queries += size, outputs += size) {
        Matrix states[2];
        for (int which = 0; which < 2; which++) {
            const char *first = (const char *)given[KEYS + which] + head * given[HEAD_STRIDE];
            states[which] = (Matrix){first, given[IN_INT8] ? first + channels : NULL, given[STRIDE], given[STRIDE]};
        }
        widen(queries, room, group, channels, given[IN_INT8] ? INT8 : BFLOAT16);
        attend_head(room, &states[0], &states[1], sums + size, sums, group, channels, tokens, scale);
        for (Py_ssize_t i = 0; i < size; i++)
            outputs[i] = rounded(sums[i]);
    }
    Py_END_ALLOW_THREADS
    PyMem_RawFree(room);
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {{"product", (PyCFunction)(void (*)(void))product, METH_FASTCALL, product_doc},
                                {"attend", (PyCFunction)(void (*)(void))attend, METH_FASTCALL, attend_doc}, {NULL}};
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_few_rows", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__few_rows(void)
{
    return PyModule_Create(&definition);
}
