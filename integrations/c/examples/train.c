/* Trains a classifier of two kinds of points, whose features have very different scales, with Batch Normalization before it:
 * forward, backward, running statistics, inference. Exits with 0 if it learned.
 *
 *     cc train.c $(pkg-config --cflags --libs batchnorm) -lm -o train
 */
#include <batchnorm.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { BATCH = 64, CHANNELS = 3, LEN = BATCH * CHANNELS, STEPS = 300 };

/* Ends the program if a call was refused. */
static void must(bn_status status) {
    if (status != BN_STATUS_OK) {
        fprintf(stderr, "%s: %s\n", bn_error_message(status), bn_last_error());
        exit(1);
    }
}

/* Numbers between 0 and 1, the same in each run. */
static double uniform(void) {
    static unsigned long long state = 1;
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return (double)(state >> 40) / (double)(1ull << 24);
}

/* The label of a point is the sign of the first feature over its scale less the third over its own. */
static void next_batch(float x[LEN], float label[BATCH]) {
    static const double scale[CHANNELS] = {1e-3, 1.0, 1e3}, offset[CHANNELS] = {5.0, -2.0, 7e3};
    for (int n = 0; n < BATCH; n++) {
        double value[CHANNELS];
        for (int c = 0; c < CHANNELS; c++) {
            value[c] = uniform() + uniform() + uniform() - 1.5;
            x[n * CHANNELS + c] = (float)(offset[c] + scale[c] * value[c]);
        }
        label[n] = value[0] > value[2] ? 1.0f : 0.0f;
    }
}

/* The probability of label 1 for one row. */
static float predict(const float *row, const float *weight) {
    float logit = 0;
    for (int c = 0; c < CHANNELS; c++) {
        logit += row[c] * weight[c];
    }
    return 1.0f / (1.0f + expf(-logit));
}

int main(void) {
    if (bn_abi_version() != BN_ABI_VERSION) {
        fprintf(stderr, "compiled for another library than %s\n", bn_version());
        return 1;
    }
    float x[LEN], y[LEN], dy[LEN], label[BATCH];
    float gamma[CHANNELS] = {1, 1, 1}, beta[CHANNELS] = {0}, dgamma[CHANNELS], dbeta[CHANNELS];
    float mean[CHANNELS] = {0}, var[CHANNELS] = {1, 1, 1}, weight[CHANNELS] = {0};
    const float rate = 0.5f;

    bn_plan *plan;
    bn_saved *saved;
    must(bn_plan_new(BN_DTYPE_F32, BN_LAYOUT_CHANNELS_LAST, BATCH, CHANNELS, NULL, 0, 1e-5, &plan));
    must(bn_saved_new(plan, &saved));

    double first = 0, last = 0;
    for (int step = 0; step < STEPS; step++) {
        next_batch(x, label);
        must(bn_forward_train(plan, x, LEN, gamma, CHANNELS, beta, CHANNELS, y, LEN, saved));
        must(bn_running_update(saved, BN_MOMENTUM_WEIGHT_OF_NEW, 0.1, BN_VARIANCE_UNBIASED, 0, mean, CHANNELS, var, CHANNELS));

        float dweight[CHANNELS] = {0};
        double loss = 0;
        for (int n = 0; n < BATCH; n++) {
            const float p = predict(y + n * CHANNELS, weight), error = (p - label[n]) / BATCH;
            loss -= log(label[n] > 0.5f ? p : 1.0f - p) / BATCH;
            for (int c = 0; c < CHANNELS; c++) {
                dweight[c] += error * y[n * CHANNELS + c];
                dy[n * CHANNELS + c] = error * weight[c];
            }
        }
        /* Nothing comes before this layer, so dx is not wanted. */
        must(bn_backward(plan, x, LEN, dy, LEN, saved, gamma, CHANNELS, beta, CHANNELS, NULL, 0, dgamma, CHANNELS, dbeta,
                         CHANNELS));
        for (int c = 0; c < CHANNELS; c++) {
            weight[c] -= rate * dweight[c];
            gamma[c] -= rate * dgamma[c];
            beta[c] -= rate * dbeta[c];
        }
        first = step == 0 ? loss : first;
        last = loss;
    }

    int right = 0;
    next_batch(x, label);
    /* In place: the output is the input. */
    must(bn_forward_infer(plan, x, LEN, gamma, CHANNELS, beta, CHANNELS, mean, CHANNELS, var, CHANNELS, x, LEN));
    for (int n = 0; n < BATCH; n++) {
        right += (predict(x + n * CHANNELS, weight) > 0.5f) == (label[n] > 0.5f);
    }
    printf("batchnorm %s: loss %.3f to %.3f, %d of %d right\n", bn_version(), first, last, right, BATCH);
    bn_saved_free(saved);
    bn_plan_free(plan);
    return last < 0.2 && right > BATCH * 9 / 10 ? 0 : 1;
}
