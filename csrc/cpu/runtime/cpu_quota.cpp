#include "cpu_quota.h"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <limits>

namespace rnnkern {
namespace {

constexpr double kNone = std::numeric_limits<double>::infinity();

// Microseconds of processor time in each period of as many. Version 2 has both in one file, and
// "max" where there is no limit; version 1 has two files, and -1.
double limit(std::istream& quota, std::istream& period) {
  double granted, of;
  return quota >> granted && period >> of && granted > 0 && of > 0 ? granted / of : kNone;
}

double limit_of(const std::string& group) {
  std::ifstream both(group + "/cpu.max");
  std::ifstream quota(group + "/cpu.cfs_quota_us"), period(group + "/cpu.cfs_period_us");
  return std::min(limit(both, both), limit(quota, period));
}

// Inside a container, the tree that is mounted may begin below the group's path: what is not there
// has no limit.
double strictest(const std::string& mount, std::string group) {
  double least = limit_of(mount);
  while (!group.empty()) {
    least = std::min(least, limit_of(mount + group));
    const size_t slash = group.rfind('/');
    group.erase(slash == std::string::npos ? 0 : slash);
  }
  return least;
}

bool controls_cpu(const std::string& controllers) {
  return ("," + controllers + ",").find(",cpu,") != std::string::npos;
}

}  // namespace

int cpu_quota(const std::string& root) {
  const std::string mount = root + "/sys/fs/cgroup";
  double least = kNone;
  std::ifstream groups(root + "/proc/self/cgroup");
  // Lines are number:controllers:path, without controllers in version 2.
  for (std::string number, controllers, path; std::getline(groups, number, ':') &&
                                              std::getline(groups, controllers, ':') &&
                                              std::getline(groups, path);) {
    if (path.find("..") != std::string::npos) path.clear();  // above what is mounted
    if (controllers.empty())
      least = std::min(least, strictest(mount, path));
    else if (controls_cpu(controllers))
      least = std::min(least, strictest(mount + "/cpu", path));
  }
  return std::isinf(least) ? 0 : int(std::min(std::ceil(least), 1e6));
}

}  // namespace rnnkern
