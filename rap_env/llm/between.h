/* What lies between the products of a layer, in one pass where torch takes ten: an RMS norm and rotary positions with
   the roundings to bfloat16 of upstream's modules, and the way of keys and values into INT8. */

/* What `rounded` does, of a vector of numbers that stay in float32: products and sums of bfloat16 numbers. What is no
   number among them has zeros in its last 16 bits, so that rounding carries nothing into its sign. */
INLINE Floats rounded_all(Floats values)
{
    const Words words = (Words)values;
    return (Floats)((words + 0x7fff + ((words >> 16) & 1)) & 0xffff0000);
}

INLINE void store(Floats rounded_values, uint16_t *to)
{
    Halves halves = __builtin_convertvector((Words)rounded_values >> 16, Halves);
    memcpy(to, &halves, sizeof halves);
}

INLINE Floats load(const uint16_t *from)
{
    return wide((const char *)from, 0, BFLOAT16);
}

INLINE float norm_scale(const uint16_t *row, ptrdiff_t k, float epsilon)
{
    Floats squares = {0};
    ptrdiff_t j = 0;
    for (; j + WIDTH <= k; j += WIDTH)
        squares += load(row + j) * load(row + j);
    float sum = total(squares);
    for (; j < k; j++)
        sum += wide_one(row[j]) * wide_one(row[j]);
    return 1 / sqrtf(sum / k + epsilon);
}

/* outputs[r] = weight times inputs[r] over the root of its mean square, [rows][k]. */
static void norm_rows(const uint16_t *inputs, const uint16_t *weight, uint16_t *outputs, ptrdiff_t rows, ptrdiff_t k,
                      float epsilon)
{
    for (; rows > 0; rows--, inputs += k, outputs += k) {
        const float scale = norm_scale(inputs, k, epsilon);
        ptrdiff_t j = 0;
        for (; j + WIDTH <= k; j += WIDTH)
            store(rounded_all(load(weight + j) * rounded_all(load(inputs + j) * scale)), outputs + j);
        for (; j < k; j++)
            outputs[j] = rounded(wide_one(weight[j]) * wide_one(rounded(wide_one(inputs[j]) * scale)));
    }
}

INLINE float times(uint16_t left, uint16_t right)
{
    return wide_one(rounded(wide_one(left) * wide_one(right)));
}

INLINE Floats times_all(const uint16_t *left, const uint16_t *right)
{
    return rounded_all(load(left) * load(right));
}

/* Turns pairs of a head's channels, one from each half, [rows][heads][2 * half], by the angles of their row
   [rows][2 * half]. */
static void turn_rows(const uint16_t *low, const uint16_t *cosines, const uint16_t *sines, uint16_t *outputs,
                      ptrdiff_t rows, ptrdiff_t heads, ptrdiff_t half)
{
    for (ptrdiff_t row = 0; row < rows; row++, cosines += 2 * half, sines += 2 * half)
        for (ptrdiff_t head = 0; head < heads; head++, low += 2 * half, outputs += 2 * half) {
            const uint16_t *high = low + half;
            ptrdiff_t i = 0, j = half;
            for (; i + WIDTH <= half; i += WIDTH, j += WIDTH) {
                store(rounded_all(times_all(low + i, cosines + i) - times_all(high + i, sines + i)), outputs + i);
                store(rounded_all(times_all(high + i, cosines + j) + times_all(low + i, sines + j)), outputs + j);
            }
            for (; i < half; i++, j++) {
                outputs[i] = rounded(times(low[i], cosines[i]) - times(high[i], sines[i]));
                outputs[j] = rounded(times(high[i], cosines[j]) + times(low[i], sines[j]));
            }
        }
}

/* A key or value in INT8 with its scale behind it, as `rap_env.llm.int8_cache.encoded` makes it. */
static void encode(const uint16_t *from, char *to, ptrdiff_t channels)
{
    float largest = 0x1p-126f * 127, sum = 0;
    for (ptrdiff_t i = 0; i < channels; i++) {
        const float size = fabsf(wide_one(from[i]));
        largest = size > largest ? size : largest;
        sum += size;
    }
    const uint16_t scale = rounded(sum != sum ? sum : largest / 127);
    for (ptrdiff_t i = 0; i < channels; i++) {
        float number = wide_one(from[i]) / wide_one(scale) + 0x1.8p23f - 0x1.8p23f; /* rounded, ties to even */
        number = number > 127 ? 127 : number < -127 ? -127 : number;
        to[i] = number == number ? (int8_t)number : 0;
    }
    memcpy(to + channels, &scale, sizeof scale);
}
