/* A stand-in for libnvidia-ml.so.1, for machines without an NVIDIA GPU: the tests run the real pynvml over it.
 *
 * NVML_STUB describes the GPUs, separated by ';', each as blank-separated fields:
 *     uuid=GPU-...  name=H100  watts=200  limit=700  counter=0|1  power=0|1  mig=0|1  instance=MIG-...
 *     to=100 at=0.5            the power becomes `to` watts `at` seconds after the start
 *     wave=50 cycle=2          a sine of `wave` watts and `cycle` seconds on top
 *     most=700                 what the power limit may be raised to
 *     period=0.1               the energy counter is brought up to date only so often
 *     sampled=0.02             the power is brought up to date only so often
 *     still=1                  the energy counter never moves
 *     zero=1                   the energy counter shows 0 at all times
 *     refuses=999              the error that the energy counter gives
 *     mute=999                 the error that the question for MIG gives
 *     jump=0.3                 the energy counter is a million joules ahead from then on
 *     restart=0.5              the energy counter restarts from zero then
 *     lost=0.5 back=0.8        the GPU cannot be read between these times
 *     reload=0.5               the driver is loaded anew then: old handles are dead, the counter starts from zero
 *     code=15                  the error that a lost GPU gives (15: GPU is lost)
 *     hidden=1                 a control group withholds the GPU
 * The start is the first initialization, or NVML_STUB_START (seconds of CLOCK_MONOTONIC), so that processes agree.
 * An empty NVML_STUB is a machine whose driver is not loaded.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { SUCCESS = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NO_PERMISSION = 4, NOT_FOUND = 6,
       DRIVER_NOT_LOADED = 9, GPU_IS_LOST = 15 };
enum { MAX_GPUS = 16 };

static const double NEVER = 1e9;

typedef struct {
    char uuid[96], instance[96], name[64];
    double watts, limit, most, to, at, wave, cycle, period, sampled, jump, restart, lost, back, reload;
    int counter, power, mig, still, zero, refuses, mute, code, hidden, is_instance;
} Gpu;

static Gpu gpus[MAX_GPUS], instances[MAX_GPUS];
static int count, users, initializations;
static double started;
static pid_t owner;

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
        *g = (Gpu){.name = "Stand-in", .watts = 100, .at = NEVER, .cycle = 1, .jump = NEVER, .restart = NEVER,
                   .lost = NEVER, .back = NEVER, .reload = NEVER, .counter = 1, .power = 1, .code = GPU_IS_LOST};
        for (char *field = strtok_r(gpu, " ", &inner); field; field = strtok_r(NULL, " ", &inner)) {
            sscanf(field, "uuid=%95s", g->uuid);
            sscanf(field, "instance=%95s", g->instance);
            sscanf(field, "name=%63s", g->name);
            sscanf(field, "watts=%lf", &g->watts);
            sscanf(field, "limit=%lf", &g->limit);
            sscanf(field, "most=%lf", &g->most);
            sscanf(field, "to=%lf", &g->to);
            sscanf(field, "at=%lf", &g->at);
            sscanf(field, "wave=%lf", &g->wave);
            sscanf(field, "cycle=%lf", &g->cycle);
            sscanf(field, "period=%lf", &g->period);
            sscanf(field, "sampled=%lf", &g->sampled);
            sscanf(field, "jump=%lf", &g->jump);
            sscanf(field, "restart=%lf", &g->restart);
            sscanf(field, "lost=%lf", &g->lost);
            sscanf(field, "back=%lf", &g->back);
            sscanf(field, "reload=%lf", &g->reload);
            sscanf(field, "counter=%d", &g->counter);
            sscanf(field, "power=%d", &g->power);
            sscanf(field, "mig=%d", &g->mig);
            sscanf(field, "still=%d", &g->still);
            sscanf(field, "zero=%d", &g->zero);
            sscanf(field, "refuses=%d", &g->refuses);
            sscanf(field, "mute=%d", &g->mute);
            sscanf(field, "code=%d", &g->code);
            sscanf(field, "hidden=%d", &g->hidden);
        }
        instances[count] = *g;
        instances[count].is_instance = 1;
        count++;
    }
    free(copy);
}

int stub_users(void) { return users; }
int stub_initializations(void) { return initializations; }

/* A process forked from one that has initialized the library has not initialized it itself. */
static int is_initialized(void) { return users && owner == getpid(); }

int nvmlInitWithFlags(unsigned flags) {
    const char *scenario = getenv("NVML_STUB"), *start = getenv("NVML_STUB_START");
    (void)flags;
    if (!scenario || !*scenario) return DRIVER_NOT_LOADED;
    if (owner != getpid()) users = 0;
    owner = getpid();
    initializations++;
    if (!users++) {
        parse(scenario);
        if (!started) started = start ? atof(start) : now();
    }
    return SUCCESS;
}

int nvmlShutdown(void) {
    if (!is_initialized()) return UNINITIALIZED;
    users--;
    return SUCCESS;
}

const char *nvmlErrorString(int code) { (void)code; return "an error of the stand-in"; }

int nvmlDeviceGetCount_v2(unsigned *n) {
    if (!is_initialized()) return UNINITIALIZED;
    *n = count;
    return SUCCESS;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, Gpu **gpu) {
    if (!is_initialized()) return UNINITIALIZED;
    if (index >= (unsigned)count) return INVALID_ARGUMENT;
    if (gpus[index].hidden) return NO_PERMISSION;
    *gpu = &gpus[index];
    return SUCCESS;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, Gpu **gpu) {
    if (!is_initialized()) return UNINITIALIZED;
    for (int i = 0; i < count; i++) {
        if (gpus[i].hidden) continue;
        if (!strcmp(uuid, gpus[i].uuid)) { *gpu = &gpus[i]; return SUCCESS; }
        if (*gpus[i].instance && !strcmp(uuid, gpus[i].instance)) { *gpu = &instances[i]; return SUCCESS; }
    }
    return NOT_FOUND;
}

int nvmlDeviceGetDeviceHandleFromMigDeviceHandle(Gpu *instance, Gpu **gpu) {
    if (!is_initialized()) return UNINITIALIZED;
    if (!instance->is_instance) return INVALID_ARGUMENT;
    *gpu = &gpus[instance - instances];
    return SUCCESS;
}

int nvmlDeviceGetUUID(Gpu *gpu, char *uuid, unsigned length) {
    if (!is_initialized()) return UNINITIALIZED;
    snprintf(uuid, length, "%s", gpu->uuid);
    return SUCCESS;
}

int nvmlDeviceGetName(Gpu *gpu, char *name, unsigned length) {
    if (!is_initialized()) return UNINITIALIZED;
    snprintf(name, length, "%s", gpu->name);
    return SUCCESS;
}

int nvmlDeviceGetMigMode(Gpu *gpu, unsigned *current, unsigned *pending) {
    if (!is_initialized()) return UNINITIALIZED;
    if (gpu->mute) return gpu->mute;
    if (!gpu->mig && !*gpu->instance) return NOT_SUPPORTED;
    *current = *pending = gpu->mig;
    return SUCCESS;
}

int nvmlDeviceGetEnforcedPowerLimit(Gpu *gpu, unsigned *milliwatts) {
    if (!is_initialized()) return UNINITIALIZED;
    if (!gpu->limit) return NOT_SUPPORTED;
    *milliwatts = 1000 * gpu->limit;
    return SUCCESS;
}

int nvmlDeviceGetPowerManagementLimitConstraints(Gpu *gpu, unsigned *least_mw, unsigned *most_mw) {
    if (!is_initialized()) return UNINITIALIZED;
    if (!gpu->most) return NOT_SUPPORTED;
    *least_mw = 1000;
    *most_mw = 1000 * gpu->most;
    return SUCCESS;
}

static int state(const Gpu *gpu) {
    if (!is_initialized()) return UNINITIALIZED;
    if (now() >= gpu->reload) return UNINITIALIZED;
    return now() >= gpu->lost && now() < gpu->back ? gpu->code : SUCCESS;
}

int nvmlDeviceGetPowerUsage(Gpu *gpu, unsigned *milliwatts) {
    double t = now();
    if (state(gpu)) return state(gpu);
    if (!gpu->power) return NOT_SUPPORTED;
    if (gpu->sampled) t = floor(t / gpu->sampled) * gpu->sampled;
    *milliwatts = 1000 * ((t < gpu->at ? gpu->watts : gpu->to) + gpu->wave * sin(2 * M_PI * t / gpu->cycle));
    return SUCCESS;
}

/* Joules from the start to t, in closed form. */
static double integral(const Gpu *gpu, double t) {
    double joules = gpu->watts * t + gpu->wave * gpu->cycle / (2 * M_PI) * (1 - cos(2 * M_PI * t / gpu->cycle));
    return t > gpu->at ? joules + (gpu->to - gpu->watts) * (t - gpu->at) : joules;
}

int nvmlDeviceGetTotalEnergyConsumption(Gpu *gpu, unsigned long long *millijoules) {
    double t = now(), held = 1e6;
    if (state(gpu)) return state(gpu);
    if (gpu->refuses) return gpu->refuses;
    if (!gpu->counter) return NOT_SUPPORTED;
    if (gpu->zero) { *millijoules = 0; return SUCCESS; }
    if (gpu->period) t = floor(t / gpu->period) * gpu->period;
    if (gpu->still) t = 0;
    double joules = integral(gpu, t);
    if (t >= gpu->restart) { held = 0; joules -= integral(gpu, gpu->restart); }
    if (t >= gpu->jump) held += 1e6;
    *millijoules = 1000 * (held + joules);
    return SUCCESS;
}

/* What CodeCarbon and Zeus ask for besides. */

int nvmlDeviceGetArchitecture(Gpu *gpu, unsigned *architecture) {
    *architecture = gpu->counter ? 9 : 4; /* Hopper, or Pascal */
    return SUCCESS;
}

typedef struct {
    unsigned field, scope;
    long long timestamp, latency;
    int type, result;
    union { double d; unsigned ui; unsigned long long ull; } value;
} Field;

/* Zeus samples the power of GPUs without a counter by these fields: 185 the mean, 186 that of the moment. */
int nvmlDeviceGetFieldValues(Gpu *gpu, int n, Field *fields) {
    if (!is_initialized()) return UNINITIALIZED;
    for (int i = 0; i < n; i++) {
        fields[i].result = NOT_SUPPORTED;
        if (fields[i].field == 185 || fields[i].field == 186) {
            fields[i].type = 1; /* unsigned int */
            fields[i].result = nvmlDeviceGetPowerUsage(gpu, &fields[i].value.ui);
        }
    }
    return SUCCESS;
}

int nvmlDeviceGetC2cModeInfoV(Gpu *gpu, void *info) { (void)gpu, (void)info; return NOT_SUPPORTED; }

int nvmlDeviceGetMemoryInfo(Gpu *gpu, unsigned long long memory[3]) {
    (void)gpu;
    memory[0] = memory[1] = 1ull << 36;
    memory[2] = 0;
    return SUCCESS;
}

int nvmlDeviceGetTemperature(Gpu *gpu, int sensor, unsigned *celsius) { (void)gpu, (void)sensor; *celsius = 40; return SUCCESS; }

int nvmlDeviceGetUtilizationRates(Gpu *gpu, unsigned rates[2]) { (void)gpu; rates[0] = rates[1] = 50; return SUCCESS; }

int nvmlDeviceGetComputeMode(Gpu *gpu, unsigned *mode) { (void)gpu; *mode = 0; return SUCCESS; }

int nvmlDeviceGetComputeRunningProcesses_v3(Gpu *gpu, unsigned *n, void *infos) { (void)gpu, (void)infos; *n = 0; return SUCCESS; }

int nvmlDeviceGetGraphicsRunningProcesses_v3(Gpu *gpu, unsigned *n, void *infos) { (void)gpu, (void)infos; *n = 0; return SUCCESS; }
