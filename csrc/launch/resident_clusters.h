// How many clusters of an on-chip stack's kernel a device holds.
#pragma once

namespace cips {

/// Clusters of kCluster blocks of kStackThreads threads that fit at once, asked once for each kernel and device; the
/// kernel may take kStackSharedBytes from then on. The device is the current one.
int resident_clusters(const void* kernel, int device);

}  // namespace cips
