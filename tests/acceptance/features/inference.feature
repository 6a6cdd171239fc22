Feature: Tokens as they are made

  @S52
  Scenario: A stream at the queen
    Given a worker "cpu0-c" with 1 slot on "lab1"
    When I stream 300 tokens from "lab1-cpu0-c" and watch the registry
    Then the status is 200 and the type is an event stream
    And tokens are numbered from 0 without a gap, then comes the end, then [DONE], once
    And the first token came long before the last
    And the registry showed the worker busy, and then idle

  @S53 @S64
  Scenario: The only slot is taken and becomes free in time
    Given a worker "cpu0-c" with 1 slot on "lab1"
    And its slot is taken for 1 second
    When I ask the worker "lab1-cpu0-c" to go on from "Hello"
    Then the command ends with 0
