/* A stand-in for libnvidia-ml.so.1, for machines without an NVIDIA GPU: the tests run the real pynvml over it.
 *
 * NVML_STUB describes the GPUs, separated by ';', each as blank-separated fields:
 *     uuid=GPU-...  watts=200  counter=0|1  power=0|1  mig=0|1  instance=MIG-...
 *     to=100 at=0.5            the power becomes `to` watts `at` seconds after initialization
 *     restart=0.5              the energy counter restarts from zero then
 *     lost=0.5 back=0.8        the GPU cannot be read between these times
 * The energy counter advances with real time x watts. An empty NVML_STUB is a machine whose driver is not loaded.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { SUCCESS = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6,
       DRIVER_NOT_LOADED = 9, GPU_IS_LOST = 15 };
enum { MAX_GPUS = 8 };

typedef struct {
    char uuid[96], instance[96];
    double watts, to, at, restart, lost, back;
    int counter, power, mig, is_instance;
} Gpu;

static Gpu gpus[MAX_GPUS], instances[MAX_GPUS];
static int count, users;
static double started;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec - started;
}

static void parse(const char *scenario) {
    char *copy = strdup(scenario), *outer = NULL, *inner = NULL;
    count = 0;
    for (char *gpu = strtok_r(copy, ";", &outer); gpu && count < MAX_GPUS; gpu = strtok_r(NULL, ";", &outer)) {
        Gpu *g = &gpus[count];
        *g = (Gpu){.watts = 100, .to = -1, .at = 1e9, .restart = 1e9, .lost = 1e9, .back = 1e9, .counter = 1, .power = 1};
        for (char *field = strtok_r(gpu, " ", &inner); field; field = strtok_r(NULL, " ", &inner)) {
            sscanf(field, "uuid=%95s", g->uuid);
            sscanf(field, "instance=%95s", g->instance);
            sscanf(field, "watts=%lf", &g->watts);
            sscanf(field, "to=%lf", &g->to);
            sscanf(field, "at=%lf", &g->at);
            sscanf(field, "restart=%lf", &g->restart);
            sscanf(field, "lost=%lf", &g->lost);
            sscanf(field, "back=%lf", &g->back);
            sscanf(field, "counter=%d", &g->counter);
            sscanf(field, "power=%d", &g->power);
            sscanf(field, "mig=%d", &g->mig);
        }
        instances[count] = *g;
        instances[count].is_instance = 1;
        count++;
    }
    free(copy);
}

int stub_users(void) { return users; }

int nvmlInitWithFlags(unsigned flags) {
    const char *scenario = getenv("NVML_STUB");
    (void)flags;
    if (!scenario || !*scenario) return DRIVER_NOT_LOADED;
    if (!users++) {
        parse(scenario);
        if (!started) started = now();
    }
    return SUCCESS;
}

int nvmlShutdown(void) {
    if (!users) return UNINITIALIZED;
    users--;
    return SUCCESS;
}

const char *nvmlErrorString(int code) { (void)code; return "an error of the stand-in"; }

int nvmlDeviceGetCount_v2(unsigned *n) {
    if (!users) return UNINITIALIZED;
    *n = count;
    return SUCCESS;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, Gpu **gpu) {
    if (!users) return UNINITIALIZED;
    if (index >= (unsigned)count) return INVALID_ARGUMENT;
    *gpu = &gpus[index];
    return SUCCESS;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, Gpu **gpu) {
    if (!users) return UNINITIALIZED;
    for (int i = 0; i < count; i++) {
        if (!strcmp(uuid, gpus[i].uuid)) { *gpu = &gpus[i]; return SUCCESS; }
        if (*gpus[i].instance && !strcmp(uuid, gpus[i].instance)) { *gpu = &instances[i]; return SUCCESS; }
    }
    return NOT_FOUND;
}

int nvmlDeviceGetDeviceHandleFromMigDeviceHandle(Gpu *instance, Gpu **gpu) {
    if (!users) return UNINITIALIZED;
    if (!instance->is_instance) return INVALID_ARGUMENT;
    *gpu = &gpus[instance - instances];
    return SUCCESS;
}

int nvmlDeviceGetUUID(Gpu *gpu, char *uuid, unsigned length) {
    if (!users) return UNINITIALIZED;
    snprintf(uuid, length, "%s", gpu->uuid);
    return SUCCESS;
}

int nvmlDeviceGetMigMode(Gpu *gpu, unsigned *current, unsigned *pending) {
    if (!users) return UNINITIALIZED;
    if (!gpu->mig && !*gpu->instance) return NOT_SUPPORTED;
    *current = *pending = gpu->mig;
    return SUCCESS;
}

static int is_lost(const Gpu *gpu) { return now() >= gpu->lost && now() < gpu->back; }

int nvmlDeviceGetPowerUsage(Gpu *gpu, unsigned *milliwatts) {
    if (!users) return UNINITIALIZED;
    if (is_lost(gpu)) return GPU_IS_LOST;
    if (!gpu->power) return NOT_SUPPORTED;
    *milliwatts = 1000 * (now() < gpu->at ? gpu->watts : gpu->to);
    return SUCCESS;
}

int nvmlDeviceGetTotalEnergyConsumption(Gpu *gpu, unsigned long long *millijoules) {
    double t = now(), held = 1e6, since = 0;
    if (!users) return UNINITIALIZED;
    if (is_lost(gpu)) return GPU_IS_LOST;
    if (!gpu->counter) return NOT_SUPPORTED;
    if (t >= gpu->restart) { held = 0; since = gpu->restart; }
    double joules = gpu->watts * (t - since);
    if (t > gpu->at) joules += (gpu->to - gpu->watts) * (t - (gpu->at > since ? gpu->at : since));
    *millijoules = held * 1000 + 1000 * joules;
    return SUCCESS;
}
