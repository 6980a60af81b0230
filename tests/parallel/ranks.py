"""The groups of processes of this tier are those of `eagleray verify`."""

from eagleray_jobs.verify.ranks import RankGroup as RankGroup
from eagleray_jobs.verify.ranks import RankGroups as RankGroups
from eagleray_jobs.verify.ranks import RanksFailed as RanksFailed
