#include "run.h"

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/util/SmallVector.h>
#include <omp.h>
#include <pthread.h>

#include <atomic>
#include <filesystem>

#ifdef FASTRNN_X86
#include <xmmintrin.h>
#endif

#include "dispatch.h"
#include "partition.h"
#include "scratch.h"

namespace fastrnn::cpu {
namespace {

// While this lives, subnormal numbers are zeros to its thread. x86 CPUs multiply them in microcode: a
// state or a gradient that decays would cost up to 80 times as much, for values that no sum shows.
// Elsewhere it does nothing.
class SubnormalsAreZeros {
public:
    SubnormalsAreZeros() : own_(get()) { set(own_ | results | operands); }
    ~SubnormalsAreZeros() { set(own_); }
    SubnormalsAreZeros(const SubnormalsAreZeros&) = delete;

private:
    static constexpr unsigned results = 0x8000, operands = 0x40;  // MXCSR's bits FTZ and DAZ
#ifdef FASTRNN_X86
    static unsigned get() { return _mm_getcsr(); }
    static void set(unsigned settings) { _mm_setcsr(settings); }
#else
    static unsigned get() { return 0; }
    static void set(unsigned) {}
#endif

    const unsigned own_;
};

// Runs one kernel with up to so many threads. False, and nothing was done, if the runtime gave fewer
// than the work was divided among: the barriers would wait for the missing ones for ever.
template <class Layer>
bool run_with(int threads, const Problem& p, Layer& layer, size_t (*workspace_size)(const Layer&),
              void (*kernel)(const Layer&, int)) {
    constexpr Pass pass = std::is_same_v<Layer, ForwardLayer> ? Pass::forward : Pass::backward;
    Team team{};
    team.partition = choose_partition(pass, layer.sequence, layer.size, p.cell.gates, threads);
    const int planned = team.partition.threads();
    team.all.reset(planned);
    c10::SmallVector<Barrier, 2> groups(team.partition.directions * team.partition.rows);
    for (Barrier& group : groups) group.reset(team.partition.units);
    team.groups = groups.data();
    layer.team = &team;
    layer.workspace = nullptr;
    const Scratch workspace(workspace_size(layer));
    layer.workspace = workspace.data();
    if (planned == 1) {
        const SubnormalsAreZeros here;
        kernel(layer, 0);
        return true;
    }
    bool enough = true;
#pragma omp parallel num_threads(planned)
    {
        const int rank = omp_get_thread_num();
        if (omp_get_num_threads() == planned) {
            const SubnormalsAreZeros here;
            kernel(layer, rank);
        } else if (rank == 0) {
            enough = false;
        }
    }
    return enough;
}

std::string counted(int64_t n, const char* what) {
    return std::to_string(n) + " " + what + (n == 1 ? "" : "s");
}

std::atomic<bool> had_others{false}, lost_threads{false};

// Threads that wait for no one's work count too, such as those of NumPy's OpenBLAS: nothing tells them
// from OpenMP's.
void count_threads() {
    std::error_code none;
    const std::filesystem::directory_iterator tasks("/proc/self/task", none);
    had_others = none || std::distance(begin(tasks), end(tasks)) > 1;
}

const int watched = pthread_atfork(count_threads, nullptr, [] {
    if (had_others) lost_threads = true;
});

int threads_allowed() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

// Whether as many models as there are threads are best run at a time, on a thread each: none waits for
// another at any step. Where their weights stay in that thread's cache, as with rows of its own.
bool side_by_side(const Problem& p, int64_t models, int64_t threads) {
    const int64_t inputs = p.input + (p.layers - 1) * p.directions * p.recurrent;
    const int64_t unit = p.cell.gates * p.hidden;
    const int64_t total = models * p.rows * p.directions * unit * (inputs + p.layers * p.recurrent);
    return threads > 1 && models >= threads && total >= worth_a_thread * threads &&
           unit * p.recurrent < values_per_thread;
}

// Runs one kernel with the threads that torch allows.
template <class Layer>
void run(const Problem& p, Layer layer, size_t (*workspace_size)(const Layer&),
         void (*kernel)(const Layer&, int)) {
    if (!run_with(threads_allowed(), p, layer, workspace_size, kernel))
        run_with(1, p, layer, workspace_size, kernel);
}

}  // namespace

void without_lost_threads() {
    if (lost_threads && at::get_num_threads() > 1) at::set_num_threads(1);
}

void forward(const Problem& p, const fastrnn::ForwardLayer& layer) {
    const Kernel& kernels = kernel(p.cell_index, p.storage);
    run(p, ForwardLayer{layer, nullptr, nullptr}, kernels.forward_workspace, kernels.forward);
}

void backward(const Problem& p, const fastrnn::BackwardLayer& layer) {
    const Kernel& kernels = kernel(p.cell_index, p.storage);
    run(p, BackwardLayer{layer, nullptr, nullptr}, kernels.backward_workspace, kernels.backward);
}

void for_each_model(const Problem& p, int64_t models, const std::function<void(int64_t)>& run) {
    const int64_t threads = threads_allowed();
    // The last ones, if they are fewer than the threads, have all of those each.
    const int64_t together =
        side_by_side(p, models, threads) ? models / threads * threads : int64_t{0};
    at::parallel_for(0, together, together / threads, [&](int64_t begin, int64_t end) {
        at::AutoDispatchBelowADInplaceOrView below_autograd;  // a thread's own, as the operator's
        for (int64_t model = begin; model < end; ++model) run(model);
    });
    for (int64_t model = together; model < models; ++model) run(model);
}

Facts explain(const Problem& p, const Sequence& sequence, const Dimensions& size, Pass pass) {
    const Kernel& kernels = kernel(p.cell_index, p.storage);
    Team team{};
    team.partition = choose_partition(pass, sequence, size, p.cell.gates, threads_allowed());
    // As if every gradient were asked for, but of no memory.
    ForwardLayer forward{};
    forward.sequence = sequence, forward.size = size, forward.team = &team;
    BackwardLayer backward{};
    backward.sequence = sequence, backward.size = size, backward.team = &team;
    const bool is_forward = pass == Pass::forward;
    const Cut cut = is_forward ? kernels.forward_cut(forward) : kernels.backward_cut(backward);
    const size_t bytes =
        is_forward ? kernels.forward_workspace(forward) : kernels.backward_workspace(backward);
    const Partition& part = team.partition;
    std::string sharing = counted(part.threads(), "thread");
    if (part.threads() > 1)
        sharing += ": " + counted(part.directions, "direction") + " x " +
                   counted(part.rows, "part") + " of the rows x " + counted(part.units, "part") +
                   " of the units";
    return {{"path", "cpu"},
            {"instruction set", isa_in_use()},
            {"partition", sharing},
            {"barriers a step", part.units > 1 ? "1" : "0"},
            {"tile", counted(cut.tile_rows, "row") + " x " + counted(cut.vectors, "vector") +
                         " of " + std::to_string(cut.lanes)},
            {"operands", cut.operands},
            {"scratch", std::to_string(bytes) + " bytes"}};
}

}  // namespace fastrnn::cpu
