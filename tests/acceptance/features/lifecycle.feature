Feature: What runs keeps running

  @S73
  Scenario: A hive outlives its workers
    Given the worker "cpu0" of "lab2" is stopped
    Then the target of "lab2" is still active
    When I start a worker "cpu0-d" with 1 slot on "lab2"
    Then the command ends with 0
    And the target of "lab2" is still active

  @S79 @S81
  Scenario: The command ends, the services stay
    Given the process ids of queen and workers
    When I ask "lab1" with "smollm2-135m-instruct" to go on from "Hello"
    Then the command ends with 0
    And the process ids of queen and workers are unchanged
    And the workers are still listed
