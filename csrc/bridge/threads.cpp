// The kernels' threads are torch's.
#include "bridge/bridge.h"

namespace fastdiff {

void parallel_for_raw(int64_t n, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) { body(begin, end, context); });
}
int64_t threads() { return torch::stable::get_num_threads(); }

}  // namespace fastdiff
